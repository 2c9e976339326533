"""darts-lora derive: another genotype from a finished search, without searching again.
Not here: the choice itself (darts_lora/discretize.py), the forms for others (formats.py)."""

import os
import sys
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from darts_lora.alpha.sizes import sizes_text
from darts_lora.base.bounds import check_bounds
from darts_lora.base.errors import InputError
from darts_lora.base.options import command, run
from darts_lora.discretize import Method, discretize
from darts_lora.genotype import Genotype
from darts_lora.views.console import show
from darts_lora.views.formats import axolotl_yaml, peft_json

FORMATS = {"table": lambda genotype: "", "axolotl": axolotl_yaml, "peft": peft_json}


@dataclass
class DeriveRun:
    """Which search, and which choice."""

    search_dir: str = "runs/search"
    """Folder of a finished search: its genotype.json holds the probabilities."""
    method: Method | None = None
    """argmax: the most probable rank of each layer; budget: the most probable choice within the
    budget; default: argmax where no budget is known."""
    budget_rank: float | None = None
    """Budget: as many trainable parameters as a uniform LoRA of this rank."""
    budget_parameters: int | None = None
    """Budget: trainable parameters (count); default of both: the budget of the search."""
    tolerance: float | None = None
    """Of a search without a budget: the smallest size that is predicted to lack at most this share
    of what the largest candidate gains over the base model, in [0, 1)."""
    output: str | None = None
    """File for the new genotype; default: genotype_<choice>.json in search_dir."""
    format: Literal["table", "axolotl", "peft"] = "table"
    """What is printed: tables of the ranks; the lora options of an axolotl configuration (YAML); or
    the arguments of PEFT's LoraConfig (JSON). Of the last two nothing else is on the standard
    output."""

    def __post_init__(self):
        check_bounds(
            self,
            at_least={"tolerance": 0.0},
            above={"budget_rank": 0.0, "budget_parameters": 0},
        )


def main(options: DeriveRun) -> None:
    """Derive another genotype from a search: another budget, or the argmax."""
    source = os.path.join(options.search_dir, "genotype.json")
    if not os.path.isfile(source):
        raise InputError(
            f"search_dir={options.search_dir!r}: has no genotype.json; "
            "run accelerate launch recipes/search.py first"
        )
    genotype = discretize(
        Genotype.load(source),
        options.method,
        budget_rank=options.budget_rank,
        budget_parameters=options.budget_parameters,
        tolerance=options.tolerance,
    )
    output = options.output or os.path.join(options.search_dir, f"genotype_{_choice(options)}.json")
    text = FORMATS[options.format](genotype)
    genotype.save(output)
    other = sys.stderr if text else sys.stdout
    show(genotype, Console(file=other))
    if options.tolerance is not None:
        print(sizes_text(genotype.found_by["sizes"]), file=other)
    print(f"Genotype: {output}. Next: {command('finetune', genotype=output)}", file=other)
    if text:
        print(text)


def _choice(options: DeriveRun) -> str:
    if options.budget_rank is not None:
        return f"rank{options.budget_rank:g}"
    if options.budget_parameters is not None:
        return f"{options.budget_parameters}"
    if options.tolerance is not None:
        return f"tolerance{options.tolerance:g}"
    return options.method or "derived"


def start() -> None:
    """Parse the command line and run."""
    run(main, DeriveRun)
