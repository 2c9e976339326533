"""Tasks that had no part in how a size is recommended (size.py): other questions, other directions.
Not here: the measurements (size.py), the tasks of quality.py.

python recipes/benchmark/size_tasks.py --turned '[e2e_train.jsonl, e2e_test.jsonl]'
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from darts_lora.base.files import check_writable, write_text
from darts_lora.base.options import run
from darts_lora.config import DataConfig
from darts_lora.data.sources import load_source

Row = dict[str, Any]


@dataclass
class TasksRun:
    """Where the rows come from, and where they go."""

    output_dir: str = "runs/size/data"
    """Folder of a folder for each task."""
    turned: list[str] = field(default_factory=list)
    """Files of JSON lines of messages; in turned_<name> the answers ask for the questions."""


def main(options: TasksRun) -> None:
    """Write the two tasks of the embedded model, and what is turned."""
    folder = Path(check_writable(options.output_dir))
    for name, wanted in {"color": _asks_color, "yes_no": _asks_yes_no}.items():
        splits = load_source(DataConfig()).splits
        kept = {split: rows.filter(wanted, keep_in_memory=True) for split, rows in splits.items()}
        DatasetDict(kept).save_to_disk(str(folder / f"embedded_{name}"))
    for path in map(Path, options.turned):
        rows = [turned(json.loads(line)) for line in path.read_text("utf-8").split("\n") if line]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(folder / f"turned_{path.name}", lines)


def turned(row: Row) -> Row:
    """The answer asks for the question."""
    roles = {"user": text_of(row, "assistant"), "assistant": text_of(row, "user")}
    return {"messages": [{"role": role, "content": text} for role, text in roles.items()]}


def text_of(row: Row, role: str) -> str:
    """What the role says in the row's messages."""
    return next(m["content"] for m in row["messages"] if m["role"] == role)


def _asks_color(row: Row) -> bool:
    return "color" in text_of(row, "user") and not _asks_yes_no(row)


def _asks_yes_no(row: Row) -> bool:
    return text_of(row, "assistant") in ("yes", "no")


if __name__ == "__main__":
    run(main, TasksRun)
