"""A finished (or unfinished) search as one HTML file with its pictures, and the pictures as PNGs.
Not here: the folders that it reads (runs.py), how pictures are drawn (charts.py)."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from PIL import Image

from darts_lora.alpha.sizes import gained, predicted_loss, recommended, sizes_text
from darts_lora.alpha.verdict import verdict_text
from darts_lora.base.errors import InputError
from darts_lora.base.files import check_writable, remove, write_into, write_text
from darts_lora.base.options import CONFIG_NAME, command
from darts_lora.genotype import Genotype
from darts_lora.lora.cost import parameters_per_rank
from darts_lora.run.runs import Search
from darts_lora.views.charts import pictures
from darts_lora.views.console import by_part, short_name

MOST_TYPES = 40  # of one part, in the table of module types
MOST_RECORDS = 50  # in the table of losses
LOSSES = ("train_loss", "validation_gain")


@dataclass
class Table:
    """Names of columns, and texts; all but the first column are numbers."""

    columns: list[str]
    rows: list[list[str]]


def write_report(search: Search, finetunes: list[dict[str, Any]], output: str) -> None:
    """Write `output` (HTML) and, in the folder beside it named as it is, each picture as a PNG.

    Raises:
        InputError: it cannot be written.
    """
    if os.path.isdir(output):
        raise InputError(f"output={output!r}: is a folder; name a file")
    drawn = pictures(search, finetunes)
    folder = check_writable(os.path.splitext(output)[0] + "_pictures", "output")
    remove(output)  # so that none stands beside pictures of another report if this run is killed

    def write(temporary: str) -> None:
        os.mkdir(temporary)
        for name, content in drawn.items():
            with open(os.path.join(temporary, f"{name}.png"), "wb") as file:
                file.write(content)

    write_into(folder, write, last="ranks.png")
    write_text(output, _page(search, finetunes, drawn))


def _page(search: Search, finetunes: list[dict[str, Any]], drawn: dict[str, bytes]) -> str:
    source = resources.files("darts_lora.views").joinpath("report.html").read_text("utf-8")
    page = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return page.from_string(source).render(
        title=f"LoRA ranks found by {os.path.basename(os.path.abspath(search.folder))}",
        card=_card(search, finetunes),
        pictures={name: _inline(content) for name, content in drawn.items()},
        types=_types(search),
        finetunes=_finetunes(finetunes, search.sizes) if finetunes else None,
        sizes=_sizes(search.sizes) if search.sizes else None,
        details=_details(search),
    )


def _inline(content: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(content)) as picture:
        width = picture.width * 2 // 3  # screens are finer than the pixels of a page
    return {"data": base64.b64encode(content).decode(), "width": width}


def _card(search: Search, finetunes: list[dict[str, Any]]) -> dict[str, str]:
    """What stands on top: what was found, what it saves, how sure that is, what to do now."""
    last = search.records[-1]
    if search.genotype is None:
        steps = search.options.get("max_steps", "?")
        resume = {"config": os.path.join(search.folder, CONFIG_NAME), "output_dir": search.folder}
        return {
            "Not finished": f"Step {last['step']} of a run of {steps}. The ranks below are the "
            "expected ones.",
            "Next": f"{command('search', **resume)} --resume",
        }
    genotype = search.genotype
    path = os.path.join(search.folder, "genotype.json")
    following = command("finetune", genotype=path)
    if finetunes:
        following = f"python recipes/derive.py --search_dir {search.folder} --budget_rank 1"
    return {
        "Found": _found(genotype, last),
        "Saves": _saves(search, genotype, finetunes),
        **({"Size": sizes_text(search.sizes)} if "sizes" in genotype.found_by else {}),
        **_verdict(genotype),
        "Next": following,
    }


def _found(genotype: Genotype, last: dict[str, Any]) -> str:
    ranks = [rank for rank in genotype.ranks.values() if rank]
    span = f"ranks {min(ranks)} to {max(ranks)}" if ranks else "no rank above 0"
    return (
        f"{len(ranks)} of {len(genotype.ranks)} layers adapted, {span}; "
        f"{genotype.num_parameters:,} trainable parameters, after {last['step']} steps and "
        f"{last['seconds']:.0f} s."
    )


def _saves(search: Search, genotype: Genotype, finetunes: list[dict[str, Any]]) -> str:
    """Parameters beside a uniform rank's; where models were tested, the best one."""
    one, largest = (
        sum(parameters_per_rank(*s) for s in search.layers.values()),
        search.candidates[-1],
    )
    size = genotype.num_parameters
    text = (
        f"As many parameters as a uniform rank of {size / one:.3g} on all layers, and "
        f"{1 - size / (one * largest):.0%} fewer than rank {largest}, the largest candidate."
    )
    tested = [run for run in finetunes if run["loss"] is not None]
    if not tested:
        return f"{text} What the ranks are worth is known once models are finetuned and tested."
    best = min(tested, key=lambda run: run["loss"])
    text += f" The lowest test loss has {best['name']}: {best['loss']:.4f}"
    if best["base"] and best["base"]["loss"] is not None:
        text += f" (base model {best['base']['loss']:.4f})"
    return f"{text}."


def _verdict(genotype: Genotype) -> dict[str, str]:
    try:
        return {"Verdict": verdict_text(genotype.found_by["verdict"])}
    except (KeyError, TypeError, ValueError, OverflowError):  # of another tool: ranks stay ranks
        return {}


def _types(search: Search) -> Table:
    """A row for each module type."""
    rows, ranks = [], search.ranks
    total = sum(parameters_per_rank(*s) * ranks[n] for n, s in search.layers.items()) or 1
    for part, kinds in by_part(search.layers).items():
        if len(kinds) > MOST_TYPES:  # the table of all layers has each
            names = [name for layers in kinds.values() for name in layers.values()]
            kinds = {"-": dict(enumerate(names))}
        for kind, layers in kinds.items():
            own = [ranks[name] for name in layers.values()]
            size = sum(parameters_per_rank(*search.layers[n]) * ranks[n] for n in layers.values())
            name = short_name(part) if kind == "-" else f"{short_name(part)} {kind}"
            span = f"{min(own):.3g} to {max(own):.3g}"
            mean = f"{sum(own) / len(own):.2f}"
            rows.append([name, f"{len(own)}", span, mean, f"{size:,.0f}", f"{size / total:.1%}"])
    return Table(["module type", "layers", "ranks", "mean", "parameters", "share"], rows)


def _sizes(sizes: dict[str, Any]) -> Table:
    """The predicted losses, a row for each uniform rank."""
    best, gain = recommended(sizes), gained(sizes)
    rows = [
        [
            f"{point['rank']}" + (" (recommended)" if point is best else ""),
            f"{point['parameters']:,}",
            *(f"{point[n]:.4f} ± {point[n + '_error']:.4f}" for n in ("uniform", "searched")),
            f"{point['behind'] / gain:.2%} ± {point['behind_error'] / gain:.2%}"
            if gain > 0
            else "-",
        ]
        for point in sizes["points"]
    ]
    columns = ["rank", "parameters", "uniform ranks", "searched ranks", "lacks of the gain"]
    return Table(columns, rows)


def _finetunes(finetunes: list[dict[str, Any]], sizes: dict[str, Any] | None) -> Table:
    """What was measured, where a search predicted it beside that."""
    runs = [("base", run["base"]) for run in finetunes if run["base"]][:1]
    runs += [(run["name"], run) for run in finetunes]
    rows = [
        [
            name,
            f"{run['trainable_parameters']:,}",
            "-" if run["loss"] is None else f"{run['loss']:.4f}",
            "-" if run["exact_match"] is None else f"{run['exact_match']:.1%}",
        ]
        for name, run in runs
    ]
    columns = ["model", "trainable parameters", "test loss", "exact match"]
    if sizes is None:
        return Table(columns, rows)
    for row, (_, run) in zip(rows, runs, strict=True):
        loss, size = run["loss"], run["trainable_parameters"]
        predicted = predicted_loss(sizes, size, run["curve"]) if "curve" in run else None
        row.append("-" if predicted is None else f"{predicted:.4f}")
        row.append("-" if None in (predicted, loss) else f"{loss - predicted:+.4f}")
    return Table([*columns, "predicted", "measured - predicted"], rows)


def _details(search: Search) -> dict[str, Table | dict[str, Any]]:
    """What is looked up: exact numbers, and how the search was made."""
    layers = [
        [
            name,
            " x ".join(map(str, shape)),
            f"{rank:.3g}",
            f"{parameters_per_rank(*shape) * rank:,.0f}",
        ]
        for (name, shape), rank in zip(search.layers.items(), search.ranks.values(), strict=True)
    ]
    apart = -(-len(search.records) // MOST_RECORDS)
    shown = search.records[::-apart][::-1]  # the last one is always there
    records = [
        [str(r["step"]), *("-" if r[name] is None else f"{r[name]:.4f}" for name in LOSSES)]
        for r in shown
    ]
    found = search.genotype.found_by if search.genotype else {}
    return {
        "All layers": Table(["layer", "in x out", "rank", "parameters"], layers),
        "Losses as numbers": Table(["step", "training loss", "gain on validation rows"], records),
        "How the ranks were found": found,
        "Configuration": search.options,
    }
