"""Packed results: the finished cells of a task in one sorted file of lines, made from its folder.
Not here: running cells (quality.py), what they amount to (quality_statistics.py).

python recipes/benchmark/quality_publish.py --output_dir runs/quality --benchmarks '[embedded_vqa]'
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quality_cells import Cell

from darts_lora import InputError
from darts_lora.base.files import write_text
from darts_lora.base.options import run

RESULTS = Path(__file__).parent / "results"
VERSIONED = ("torch", "transformers", "peft", "accelerate")
# What the runner alone needs, the file's name says, or PEFT gave before it was scaled to the budget
LEFT_OUT = ("cell_seconds", "benchmark", "own_ranks")
Record = dict[str, Any]


@dataclass
class PublishRun:
    """What is packed, and where it goes."""

    output_dir: str = "runs/quality"
    """Folder of the tasks' folders of cells."""
    benchmarks: list[str] | None = None
    """Folders to pack; default: all that have cells."""
    published: str = str(RESULTS / "quality")
    """Folder of the packed files, <benchmark>.jsonl each."""
    commit: str | None = None
    """Commit of the code that made the cells; default: the one that is checked out. Versions of
    libraries are noted in the default case alone."""


def main(options: PublishRun) -> None:
    """Pack the folders: a head line, then a line for each cell, sorted by its name."""
    folder = Path(options.output_dir)
    names = options.benchmarks or sorted(p.parent.name for p in folder.glob("*/options.json"))
    if not names:
        raise InputError(f"output_dir={options.output_dir!r}: no folder in it has cells")
    for name in names:
        if not (folder / name / "options.json").exists():
            raise InputError(f"benchmarks={names}: {folder / name} has no cells (options.json)")
        packed = pack(folder / name, options.commit)
        write_text(Path(options.published) / f"{name}.jsonl", packed)
        print(f"{Path(options.published) / name}.jsonl: {packed.count(chr(10)) - 1} cells")


def pack(folder: Path, commit: str | None = None) -> str:
    """A folder of cells as lines of JSON.

    The head has: options of the run, commit, versions of the libraries, task: the digest of rows
    and model. None: not known. LEFT_OUT is left out, and so are the ranks of uniform plans, since
    the budget says all of them.

    Raises:
        InputError: cells of different rows or models.
    """
    cells = [json.loads(p.read_text()) for p in folder.glob("*.json") if p.name != "options.json"]
    digests = {cell.pop("task", None) for cell in cells}
    if len(digests) > 1:
        raise InputError(
            f"{folder}: cells of different rows or models (task={sorted(map(str, digests))})"
        )
    head = {
        "options": json.loads((folder / "options.json").read_text()),
        "commit": commit or _checked_out(),
        "versions": None if commit else {name: version(name) for name in VERSIONED},
        "task": digests.pop() if digests else None,
    }
    lines = []
    for cell in sorted(cells, key=_name):
        without = LEFT_OUT + ("ranks",) * (cell["method"] == "uniform")
        lines.append({key: value for key, value in cell.items() if key not in without})
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in (head, *lines))


def read(path: Path) -> tuple[Record, list[Record]]:
    """Options and cells of a task, in order of the cells' names.

    Args:
        path: a folder of cells, or a packed file.
    """
    if path.is_dir():
        files = [p for p in path.glob("*.json") if p.name != "options.json"]
        options, cells = path / "options.json", [json.loads(p.read_text()) for p in files]
        return json.loads(options.read_text()) if options.exists() else {}, sorted(cells, key=_name)
    head, *cells = map(json.loads, path.read_text().splitlines())
    digest = {"task": head["task"]} if head["task"] else {}
    return head["options"], [cell | digest for cell in cells]


def tasks_in(folder: Path) -> dict[str, Path]:
    """Name of a task -> its folder of cells or packed file, all that are in a folder."""
    found = [*folder.glob("*.jsonl"), *(p.parent for p in folder.glob("*/options.json"))]
    return {path.stem if path.is_file() else path.name: path for path in sorted(found)}


def _name(record: Record) -> str:
    fields = ("stage", "method", "budget", "seed", "find_rate", "rate")
    return f"{Cell(*(record[field] for field in fields)).name}.json"


def _checked_out() -> str:
    """The commit of this checkout; -dirty where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    if found.returncode:
        raise InputError("commit: no git checkout here; give the commit that made the cells")
    return found.stdout.strip()


if __name__ == "__main__":
    run(main, PublishRun)
