"""Tasks that had no part in how a size is recommended (size.py): other questions, other directions.
Not here: the measurements (size.py), the tasks of quality.py.

python recipes/benchmark/size_tasks.py --turned '[e2e_train.jsonl, e2e_test.jsonl]'
python recipes/benchmark/size_tasks.py --ratings '[e2e_train.jsonl, e2e_test.jsonl]' \\
    --operations '[gsm8k_train.jsonl, gsm8k_test.jsonl]'
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from darts_lora.base.files import check_writable, write_text
from darts_lora.base.options import run
from darts_lora.config import DataConfig
from darts_lora.data.sources import load_source

Row = dict[str, Any]
RATINGS = ("low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5")
OPERATIONS = "+-*/"
WORDS = 20  # of a text that gets a label, at most: short rows, for a CPU
# an arithmetic expression in front of its result, as GSM8K's answers have them: 48/2 = <<48/2=24>>
EXPRESSION = re.compile(r"[\d.,$%()\s]*(?:[-+*/x][\d.,$%()\s]*)*=[\s$]*<<([^<>=]*)=[^<>]*>>")


@dataclass
class TasksRun:
    """Where the rows come from, and where they go."""

    output_dir: str = "runs/size/data"
    """Folder of a folder for each task."""
    turned: list[str] = field(default_factory=list)
    """Files of JSON lines of messages; in turned_<name> the answers ask for the questions."""
    ratings: list[str] = field(default_factory=list)
    """Files of E2E; rating_<name> has descriptions, and the customer rating that each is about."""
    operations: list[str] = field(default_factory=list)
    """Files of GSM8K; operation_<name> has steps of the answers, and the arithmetic operation that
    gives the number in each, which is left out."""


def main(options: TasksRun) -> None:
    """Write the two tasks of the embedded model, and what is turned."""
    folder = Path(check_writable(options.output_dir))
    for name, wanted in {"color": _asks_color, "yes_no": _asks_yes_no}.items():
        splits = load_source(DataConfig()).splits
        kept = {split: rows.filter(wanted, keep_in_memory=True) for split, rows in splits.items()}
        DatasetDict(kept).save_to_disk(str(folder / f"embedded_{name}"))
    made: dict[str, tuple[list[str], Callable[[Row], Iterable[Row]]]] = {
        "turned": (options.turned, lambda row: [turned(row)]),
        "rating": (options.ratings, rated),
        "operation": (options.operations, operated),
    }
    for kind, (paths, rows_of) in made.items():
        for path in map(Path, paths):
            read = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
            rows = [row for one in read for row in rows_of(one)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            write_text(folder / f"{kind}_{path.name}", lines)


def turned(row: Row) -> Row:
    """The answer asks for the question."""
    roles = {"user": text_of(row, "assistant"), "assistant": text_of(row, "user")}
    return {"messages": [{"role": role, "content": text} for role, text in roles.items()]}


def rated(row: Row) -> list[Row]:
    """The description, and the number of the rating in the record; nothing where there is none."""
    found = re.search(r"customer rating\[([^\]]*)\]", text_of(row, "user"))
    text = text_of(row, "assistant")
    if found is None or len(text.split()) > WORDS:
        return []
    return [{"text": text, "label": RATINGS.index(found[1])}]


def operated(row: Row) -> list[Row]:
    """The answer's steps that take one operation, each without it, and the operation's number."""
    rows = []
    for line in text_of(row, "assistant").split("\n"):
        found = EXPRESSION.findall(line)
        signs = set(re.findall(r"(?<=[\d.)%])[-+*/](?=[\d.(])", found[0])) if found else set()
        text = " ".join(EXPRESSION.sub(" ", line).split())
        told = re.search(r"[^\x00-\x7f]|[+*/=<>]|\d *[-x] *\d", text)
        if len(found) == len(signs) == 1 and not told and 4 <= len(text.split()) <= WORDS:
            rows.append({"text": text, "label": OPERATIONS.index(signs.pop())})
    return rows


def text_of(row: Row, role: str) -> str:
    """What the role says in the row's messages."""
    return next(m["content"] for m in row["messages"] if m["role"] == role)


def _asks_color(row: Row) -> bool:
    return "color" in text_of(row, "user") and not _asks_yes_no(row)


def _asks_yes_no(row: Row) -> bool:
    return text_of(row, "assistant") in ("yes", "no")


if __name__ == "__main__":
    run(main, TasksRun)
