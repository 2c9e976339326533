"""A genotype as tables for the screen: ranks by layer and module type, parameters by part.
Not here: what goes to TensorBoard (tensorboard.py) and the verdict's words (verdict.py)."""

from __future__ import annotations

import re
from collections import defaultdict

from rich.console import Console
from rich.table import Table

from darts_lora.genotype import Genotype

_LAYER_NUMBER = re.compile(r"^(?P<part>.*?)\.(?P<layer>\d+)\.(?P<kind>.+)$")


def by_part(names) -> dict[str, dict[str, dict[int, str]]]:
    """Module names as part of the model -> module type -> depth -> name.

    The first number in a name is its depth: "vision.layers.3.mlp.fc1" is part "vision.layers",
    type "mlp.fc1", depth 3. A name without a number is a part of its own, at depth 0.
    """
    parts: dict = defaultdict(lambda: defaultdict(dict))
    for name in names:
        match = _LAYER_NUMBER.match(name)
        part, layer, kind = match.group("part", "layer", "kind") if match else (name, 0, "-")
        parts[part][kind][int(layer)] = name
    return parts


def rank_tables(genotype: Genotype) -> list[Table]:
    """One table for each part of the model: a row a module type, the ranks in order of depth."""
    tables = []
    for part, kinds in by_part(genotype.ranks).items():
        depths = sorted({depth for layers in kinds.values() for depth in layers})
        width = max(len(str(value)) for value in [*genotype.ranks.values(), *depths])
        table = Table(title=part, title_justify="left", expand=False)
        table.add_column("module")
        table.add_column(" ".join(f"{depth:>{width}}" for depth in depths), no_wrap=False)
        table.add_column("mean", justify="right")
        if genotype.shapes is not None:
            table.add_column("parameters", justify="right")
        for kind, layers in kinds.items():
            ranks = {depth: genotype.ranks[name] for depth, name in layers.items()}
            row = " ".join(f"{ranks.get(depth, '.'):>{width}}" for depth in depths)
            cells = [kind, row, f"{sum(ranks.values()) / len(ranks):.1f}"]
            if genotype.shapes is not None:
                sizes = [sum(genotype.shapes[n]) * genotype.ranks[n] for n in layers.values()]
                cells.append(f"{sum(sizes):,}")
            table.add_row(*cells)
        tables.append(table)
    return tables


def show(genotype: Genotype, console: Console | None = None) -> None:
    """Print the rank tables and the total of parameters."""
    console = console or Console()
    for table in rank_tables(genotype):
        console.print(table)
    if genotype.shapes is not None:
        adapted = sum(rank > 0 for rank in genotype.ranks.values())
        console.print(
            f"{adapted} of {len(genotype.ranks)} layers adapted, "
            f"{genotype.num_parameters:,} trainable parameters"
        )
