"""What the folders of a search (finished or not) and of an evaluated finetune hold, checked.
Not here: how it is drawn (report.py), the records that a search writes (records.py)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from darts_lora.base.bounds import is_real
from darts_lora.base.errors import InputError, told_as
from darts_lora.base.files import read_json
from darts_lora.base.options import CONFIG_NAME, command, load_config
from darts_lora.genotype import Genotype
from darts_lora.lora.parts import PARTS
from darts_lora.run.records import read_metrics
from darts_lora.run.together import other_task, task_of

# What a file of others raises while it is taken apart.
BAD = (InputError, ValueError, KeyError, TypeError, AttributeError)


@dataclass
class Search:
    """What a search's folder holds."""

    folder: str
    layers: Mapping[str, tuple[int, ...]]
    """Layer name -> (in, out)."""
    candidates: list[int]
    budget: float | None
    parts: dict[str, str]
    """Layer name -> vision, language or connector."""
    records: list[dict[str, Any]]
    """Of metrics.jsonl, one a step."""
    options: dict[str, Any] = field(default_factory=dict)
    genotype: Genotype | None = None
    """None: the search is not finished."""

    @classmethod
    def load(cls, folder: str) -> Search:
        """Read a search's folder, finished or not.

        Raises:
            InputError: it is not the folder of a search, or has no record yet.
        """
        paths = {
            name: os.path.join(folder, name)
            for name in ("layers.json", "metrics.jsonl", CONFIG_NAME, "genotype.json")
        }
        missing = f"search_dir={folder!r}: no search's layers.json there"
        with told_as(missing, *BAD, behind="; name the output_dir of recipes/search.py"):
            about = read_json(paths["layers.json"])
            layers, parts = _layers(about), about["parts"]
            if not (parts.keys() == layers.ranks.keys() and set(parts.values()) <= set(PARTS)):
                raise ValueError(f"parts must give each layer one of {', '.join(PARTS)}")
        records = read_metrics(paths["metrics.jsonl"])
        for number, record in enumerate(records, start=1):
            if not _is_record(record, len(layers.ranks)):
                raise InputError(
                    f"{paths['metrics.jsonl']}: line {number} is no record of this search"
                )
        if not records:
            raise InputError(f"search_dir={folder!r}: metrics.jsonl has no record yet")
        by_step = {record["step"]: record for record in records}  # written twice counts once
        finished, config = (os.path.isfile(paths[n]) for n in ("genotype.json", CONFIG_NAME))
        genotype = Genotype.load(paths["genotype.json"]) if finished else None
        if genotype is not None and genotype.shapes != layers.shapes:
            raise InputError(f"{paths['genotype.json']}: its layers are not those of layers.json")
        return cls(
            folder,
            layers.shapes,
            layers.candidates,
            about["budget"],
            parts,
            [by_step[step] for step in sorted(by_step)],
            load_config(paths[CONFIG_NAME]) if config else {},
            genotype,
        )

    @property
    def sizes(self) -> dict[str, Any] | None:
        """What a finished search without a budget predicts of each size (alpha/sizes.py)."""
        return None if self.genotype is None else self.genotype.found_by.get("sizes")

    @property
    def ranks(self) -> dict[str, float]:
        """The chosen ranks; of an unfinished search the expected ones."""
        if self.genotype is not None:
            return dict(self.genotype.ranks)
        return dict(zip(self.layers, self.records[-1]["expected_ranks"], strict=True))


def load_finetune(folder: str, search: Search | None = None) -> dict[str, Any]:
    """A finetune's name, trainable parameters, test loss and exact match, those of its base, and
    the curve that predicts it: uniform ranks or searched ones.

    Args:
        search: what it is to be set beside.

    Raises:
        InputError: the folder has no evaluation.json, or the finetune is of another model or of
            other data than the search.
    """
    theirs, ours = task_of(folder), {} if search is None else search.options
    if name := other_task(ours, theirs):
        raise InputError(
            f"finetune_dir={folder!r}: has {name}={theirs[name]!r}, the search {search.folder!r} "
            f"has {name}={ours[name]!r}: their losses cannot be compared"
        )
    missing = f"finetune_dir={folder!r}: no evaluation.json there"
    with told_as(missing, *BAD, behind=f"; run `{command('evaluate', adapter=folder)}` first"):
        results = read_json(os.path.join(folder, "evaluation.json"))
        adapter, base = results["adapter"], results.get("base")
        for result in (adapter, base or adapter):
            numbers = [result[name] for name in ("loss", "exact_match", "trainable_parameters")]
            if not all(map(_is_number, numbers)) or numbers[-1] is None:
                raise ValueError("loss, exact_match and trainable_parameters must be numbers")
    name = os.path.basename(os.path.normpath(folder))
    curve = "searched" if theirs.get("rank") is None else "uniform"
    return {"name": name, **adapter} | {"base": base, "curve": curve}


def _layers(about: Any) -> Genotype:
    """What layers.json says of the search, checked as a genotype is."""
    return Genotype(
        dict.fromkeys(about["shapes"], 0),
        shapes=about["shapes"],
        candidates=list(about["candidates"]),
        found_by={"budget_parameters": about["budget"]},
    )


def _is_number(value: Any) -> bool:
    """None stands for one that was not finite."""
    return value is None or is_real(value)


def _is_record(record: Any, layers: int) -> bool:
    needed = {"train_loss", "validation_gain", "expected_parameters", "expected_ranks"}
    if not isinstance(record, dict) or not needed | {"step", "seconds"} <= record.keys():
        return False
    ranks = record["expected_ranks"]
    if not isinstance(ranks, list) or len(ranks) != layers or type(record["step"]) is not int:
        return False
    numbers = [record["train_loss"], record["expected_parameters"], record["seconds"], *ranks]
    return None not in numbers and all(map(_is_number, [*numbers, record["validation_gain"]]))
