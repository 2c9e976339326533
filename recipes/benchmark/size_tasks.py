"""Tasks that had no part in how a size is recommended (size.py): other questions, other directions.
Not here: the measurements (size.py), the tasks of quality.py.

python recipes/benchmark/size_tasks.py --e2e '[e2e_train.jsonl, e2e_test.jsonl]' \
    --gsm8k_train gsm8k_train.jsonl --gsm8k_test gsm8k_test.jsonl
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from darts_lora.base.files import check_writable, write_text
from darts_lora.base.options import run
from darts_lora.config import DataConfig
from darts_lora.data.sources import load_source

TEST = 0.15  # of the records of E2E, all texts of which are test rows
Row = dict[str, Any]


@dataclass
class TasksRun:
    """Where the rows come from, and where they go."""

    output_dir: str = "runs/size/data"
    """Folder of a folder for each task."""
    e2e: list[str] = field(default_factory=list)
    """Files of E2E (JSON lines of messages: a record, and a text that says it)."""
    gsm8k_train: str | None = None
    """Training rows of GSM8K (JSON lines of messages: a question, and its worked answer)."""
    gsm8k_test: str | None = None
    """Its test rows."""


def main(options: TasksRun) -> None:
    """Write the rows of each task whose source is given; the embedded ones always."""
    folder = Path(check_writable(options.output_dir))
    for name, wanted in {"color": _asks_color, "yes_no": _asks_yes_no}.items():
        splits = load_source(DataConfig()).splits
        kept = {split: rows.filter(wanted, keep_in_memory=True) for split, rows in splits.items()}
        DatasetDict(kept).save_to_disk(str(folder / f"embedded_{name}"))
    if options.e2e:
        rows = [turned(row) for path in options.e2e for row in _lines(path)]
        is_test = [_share(text_of(row, "assistant")) < TEST for row in rows]
        for split, wanted in {"train": False, "test": True}.items():
            chosen = (row for row, test in zip(rows, is_test, strict=True) if test is wanted)
            _write(folder / f"e2e_records_{split}.jsonl", chosen)
    for split in ("train", "test"):
        if path := getattr(options, f"gsm8k_{split}"):
            _write(folder / f"gsm8k_questions_{split}.jsonl", map(turned, _lines(path)))


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


def _share(text: str) -> float:
    """A number in [0, 1) that follows from the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") / 2**32


def _lines(path: str) -> list[Row]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").split("\n") if line]


def _write(path: Path, rows: Iterable[Row]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    run(main, TasksRun)
