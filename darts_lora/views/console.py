"""What the screen shows: a genotype's ranks by layer and module type, a batch, a supernet's layers.
Not here: what goes to TensorBoard (tensorboard.py) and the verdict's words (verdict.py)."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from darts_lora.alpha.sizes import RATE_TEXT, gained, recommended, sizes_text
from darts_lora.base.errors import printable
from darts_lora.data.collator import IGNORED
from darts_lora.genotype import Genotype
from darts_lora.lora.cost import parameters_per_rank
from darts_lora.lora.experts import expert_tensors
from darts_lora.lora.parts import layer_type, model_parts
from darts_lora.lora.probe import left_out_lines
from darts_lora.supernet import Supernet

BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "12345678"  # the others for terminals that have no blocks
MOST_ALONE = 20  # names without a number, each of which gets a table and a panel
FILE_WIDTH = 250  # characters: a file has no edge at which lines must end
MOST_NUMBERS = 50  # characters of a row of numbers; deeper models show bars alone
_LAYER_NUMBER = re.compile(r"^(?P<part>.*?)\.(?P<layer>\d+)\.(?P<kind>.+)$")


def by_part(names) -> dict[str, dict[str, dict[int, str]]]:
    """Module names as part of the model -> module type -> depth -> name.

    The first number in a name is its depth: "vision.layers.3.mlp.fc1" is part "vision.layers",
    type "mlp.fc1", depth 3. A name without a number is a part of its own, at depth 0; of more than
    MOST_ALONE such names, each is a type of the part "others".
    """
    matches = {name: _LAYER_NUMBER.match(name) for name in names}
    many = list(matches.values()).count(None) > MOST_ALONE
    parts: dict = defaultdict(lambda: defaultdict(dict))
    for name, match in matches.items():
        alone = ("others", 0, name) if many else (name, 0, "-")
        part, layer, kind = match.group("part", "layer", "kind") if match else alone
        parts[part][kind][int(layer)] = name
    return parts


def short_name(part: str) -> str:
    """The telling end of a part's name: "model.language_model.layers" is "language_model"."""
    pieces = [piece for piece in part.split(".") if piece not in ("model", "layers", "base_model")]
    return ".".join(pieces[-2:]) or part


def short_names(parts) -> dict[str, str]:
    """Part -> its short name, or its whole name where two would share a short one."""
    short = {part: short_name(part) for part in parts}
    shared = Counter(short.values())
    return {part: name if shared[name] == 1 else part for part, name in short.items()}


def rank_tables(genotype: Genotype, blocks: str = BARS) -> list[Table]:
    """A table for each part of the model: a row a module type (one for all, where no layer has an
    adapter), the ranks by depth as bars (of these characters) and, where few, as numbers."""
    tables, largest = [], max([*genotype.ranks.values(), 1])
    for part, kinds in by_part(genotype.ranks).items():
        depths = sorted({depth for layers in kinds.values() for depth in layers})
        width = max(len(str(value)) for value in [*genotype.ranks.values(), *depths])
        table = Table(title=escape(part), title_justify="left", expand=False)
        table.add_column("module")
        few = len(depths) * (width + 1) <= MOST_NUMBERS
        if few:
            table.add_column(" ".join(f"{depth:>{width}}" for depth in depths))
        table.add_column(f"{depths[0]}..{depths[-1]}" if len(depths) > 1 else "", overflow="fold")
        table.add_column("mean", justify="right")
        if genotype.shapes is not None:
            table.add_column("parameters", justify="right")
        if not any(genotype.ranks[n] for layers in kinds.values() for n in layers.values()):
            count = sum(map(len, kinds.values()))
            table.add_row(f"all {count} layers", *["0"] * (len(table.columns) - 1))
            kinds = {}
        for kind, layers in kinds.items():
            ranks = {depth: genotype.ranks[name] for depth, name in layers.items()}
            row = " ".join(f"{ranks.get(depth, '.'):>{width}}" for depth in depths)
            bars = "".join(_bar(ranks.get(depth), largest, blocks) for depth in depths)
            mean = f"{sum(ranks.values()) / len(ranks):.1f}"
            cells = [escape(kind), *([row] if few else []), bars, mean]
            if genotype.shapes is not None:
                sizes = [
                    parameters_per_rank(*genotype.shapes[n]) * genotype.ranks[n]
                    for n in layers.values()
                ]
                cells.append(f"{sum(sizes):,}")
            table.add_row(*cells)
        tables.append(table)
    return tables


def _bar(rank: int | None, largest: int, blocks: str) -> str:
    """A block as high as the rank; a dot for 0, a blank where there is no layer."""
    if not rank:
        return " " if rank is None else "." if blocks is PLAIN_BARS else "·"
    return blocks[math.ceil(rank / largest * len(blocks)) - 1]


def show(genotype: Genotype, console: Console | None = None) -> None:
    """Print the rank tables and the total of parameters; in a notebook, as HTML."""
    console = console or Console()
    plain = console.options.ascii_only
    for table in rank_tables(genotype, PLAIN_BARS if plain else BARS):
        _print(table, console)
    if genotype.shapes is not None:
        adapted = sum(rank > 0 for rank in genotype.ranks.values())
        console.print(
            f"{adapted} of {len(genotype.ranks)} layers adapted, "
            f"{genotype.num_parameters:,} trainable parameters"
        )


def _print(table: Table, console: Console) -> None:
    """In a file in few lines, which do not depend on a terminal's width."""
    if console.is_terminal or console.is_jupyter:
        console.print(table)
        return
    table.box = None
    if table.title:
        table.columns[0].header, table.title = table.title, None
    console.print(table, width=FILE_WIDTH, crop=False)


def size_table(sizes: dict[str, Any]) -> Table:
    """What is predicted of each size: a row for each uniform rank."""
    table, best = Table(), recommended(sizes)
    for column in ("rank", "parameters", "uniform", "searched", "+-", "lacks", ""):
        table.add_column(column, justify="right" if column else "left")
    gain = gained(sizes)
    for point in sizes["points"]:
        lacks = (100 * point[name] / gain for name in ("behind", "behind_error"))
        table.add_row(
            str(point["rank"]),
            f"{point['parameters']:,}",
            f"{point['uniform']:.4g}",
            f"{point['searched']:.4g}",
            f"{point['uniform_error']:.1g}",
            "{:.1f} +- {:.1f} %".format(*lacks) if gain > 0 else "-",
            "recommended" if point is best else "",
        )
    return table


def show_sizes(sizes: dict[str, Any] | None, console: Console | None = None) -> None:
    """Print the predicted losses, the recommended size, and what is known of the learning rate."""
    console = console or Console()
    text = sizes_text(sizes)
    if sizes is not None:
        console.print("Predicted loss of a whole run at each size:", highlight=False)
        _print(size_table(sizes), console)
        text = f"{text} {RATE_TEXT}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_batch(batch: dict[str, Tensor], tokenizer, console: Console | None = None) -> None:
    """Print the tensors of a batch, the text of its first row, and what of it the loss counts."""
    console = console or Console()
    table = Table(title="one batch", title_justify="left")
    for column in ("tensor", "shape", "type"):
        table.add_column(column)
    for name, value in batch.items():
        table.add_row(name, str(list(value.shape)), str(value.dtype).removeprefix("torch."))
    console.print(table)
    tokens, labels = batch["input_ids"][0], batch["labels"][0]
    console.print("first row:", style="bold")
    console.print(_decoded(tokenizer, tokens[batch["attention_mask"][0] == 1]), markup=False)
    console.print("its label:" if labels.dim() == 0 else "what is learnt of it:", style="bold")
    if labels.dim() == 0:
        console.print(int(labels))
        return
    console.print(_decoded(tokenizer, labels[labels != IGNORED]), markup=False)
    share = (batch["labels"] != IGNORED).sum() / batch["attention_mask"].sum()
    console.print(f"{float(share):.1%} of the batch's tokens are supervised")


def _decoded(tokenizer, tokens: Tensor) -> str:
    """The text, with a run of one token (an image's, as a rule) written once: <image> x 576; what
    it has for the terminal (colours, a cleared screen) comes as escapes."""
    values, counts = torch.unique_consecutive(tokens, return_counts=True)
    pieces, run = [], []
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if count < 4:
            run += [value] * count
            continue
        pieces += [tokenizer.decode(run), f"{tokenizer.decode([value])} x {count} "]
        run = []
    return printable("".join([*pieces, tokenizer.decode(run)]), keep="\n\t")


def show_supernet(supernet: Supernet, console: Console | None = None) -> None:
    """Print what is searched: module types with number, shape and parameters at rank 1."""
    console = console or Console()
    parts = model_parts(supernet.model)
    table = Table(title="searched layers", title_justify="left")
    table.add_column("module", overflow="fold")
    table.add_column("part")
    for column in ("layers", "in -> out", "rank 1"):
        table.add_column(column, justify="right")
    for group, kinds in by_part(supernet.layers).items():
        for kind, names in kinds.items():
            layers = [supernet.layers[name] for name in names.values()]
            shapes = dict.fromkeys(layer.shape for layer in layers)
            table.add_row(
                escape(group if kind == "-" else f"{group}.*.{kind}"),
                parts.get(next(iter(names.values())), "-"),
                str(len(layers)),
                ", ".join(map(_shape_text, shapes)),
                f"{sum(parameters_per_rank(*layer.shape) for layer in layers):,}",
            )
    console.print(table)
    for name in supernet.saved_modules:
        console.print(f"trained in full and saved with the adapter: {name}", markup=False)
    for line in (*left_out_lines(supernet.left_out), *_unreached_lines(supernet)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    searched = sum(p.numel() for p in supernet.weight_parameters())
    whole = sum(p.numel() for p in supernet.model.parameters())
    console.print(
        f"{len(supernet.layers)} layers, candidate ranks {list(supernet.config.ranks)}; budget "
        f"{'none' if supernet.budget is None else f'{supernet.budget:,.0f} parameters'}; uniform "
        f"rank 1: {supernet.parameters_per_rank:,}; the search trains {searched:,} weights beside "
        f"{whole - searched:,} frozen ones",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _unreached_lines(supernet: Supernet) -> list[str]:
    """How many of the model's parameters are in no searched layer, and where most of them are."""
    own = {id(p) for p in supernet.weight_parameters()}
    reached = {id(layer.weight) for layer in supernet.layers.values()}
    whole = 0
    left: Counter[str] = Counter()
    for name, parameter in supernet.model.named_parameters():
        if id(parameter) not in own:
            whole += parameter.numel()
            if id(parameter) not in reached:
                left[layer_type(name.replace(".base_layer", ""))] += parameter.numel()
    if not left:
        return []
    most = ", ".join(f"{name} ({count:,})" for name, count in left.most_common(3))
    lines = [
        f"no adapter reaches {left.total():,} of {whole:,} parameters "
        f"({left.total() / whole:.0%}), most of them in {most}"
    ]
    experts = {
        name: shape
        for name, shape in expert_tensors(supernet.model).items()
        if id(supernet.model.get_parameter(name)) not in reached
    }
    if experts:
        size = sum(count * inside * outside for count, inside, outside in experts.values())
        lines.append(
            f"experts that are not searched: {len(experts)} tensors, {size:,} parameters; "
            "--target_parameters all-experts searches them"
        )
    return lines


def _shape_text(shape: tuple[int, ...]) -> str:
    *experts, inside, outside = shape
    return "".join(f"{count} x " for count in experts) + f"{inside} -> {outside}"
