"""Kills a finetune, a derive and a report where another run's results are: is what is left of one?
Not here: the search (kill_test.py), and how processes are started and waited for.

A run B is killed in a folder where run A has ended. Then all files there must be A's or B's, and B
anew must end as if nothing had been before.
"""

import base64
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load

from darts_lora import (
    InputError,
    finetune,  # noqa: F401 - not in each process
)
from darts_lora.base.files import locked
from darts_lora.run import callbacks
from darts_lora.views import report  # noqa: F401

KILLED = ("finetune", "derive", "report")
OPERATIONS = ("replace", "remove", "fsync", "mkdir", "rmdir")  # of os, before one of which it dies
WEIGHTS = "adapter_model.safetensors"


def kill_results(
    recipe: str,
    folder: Path,
    first: Path,
    second: Path,
    options: Any,
    moments: random.Random,
    processes: tuple[Callable[..., int], Callable[[int], int | None]],
) -> list[dict]:
    """Kill the recipe options.kills times; a record for each.

    Args:
        first, second: folders of two searches, of which runs A and B are made.
        options: kills, and the recipes' options.
        processes: (recipe, options, log, what to call there first) -> the number of its process;
            that number -> exit status, when it ends.
    """
    start, end = processes
    place, log = folder / recipe, folder / "log.txt"
    commands = [_command(recipe, search, place, options) for search in (first, second)]

    def whole(command: list[str]) -> dict[str, bytes]:
        if status := end(start(recipe, command, log)):
            raise InputError(f"{recipe}: ended with status {status}; see log.txt in output_dir")
        return _files(place)

    shutil.rmtree(place, ignore_errors=True)
    a = whole(commands[0]) | ({"evaluation.json": b"{}"} if recipe == "finetune" else {})
    counted = folder / "operations"
    if end(start(recipe, commands[1], log, lambda: _count(counted))):
        raise InputError(f"{recipe}: ended with an error; see log.txt in output_dir")
    operations, seconds = json.loads(counted.read_text())
    b, records = _files(place), []
    for kill in range(options.kills):
        shutil.rmtree(place)
        _restore(place, a)
        (folder / "saved").unlink(missing_ok=True)
        inside, number = kill % 2 == 1, moments.randrange(operations)
        at = None if inside else moments.uniform(0, 1) * seconds
        end(start(recipe, commands[1], log, lambda: _die(number, at, folder / "saved")))  # noqa: B023
        record = {"kill": kill, "recipe": recipe, "operation": number if inside else None}
        with locked(str(place)):  # as the next run there begins
            pass
        left = _files(place)
        saved = (folder / "saved").exists()
        record["problem"] = _mixed(recipe, left, a, b) or _lost(left, a, saved)
        again = whole(commands[1])
        same = all(again.get(name) == b[name] for name in b if _is_exact(name))
        record["right"] = record["problem"] is None and same
        records.append(record)
        print(json.dumps(record), flush=True)
    return records


def _command(recipe: str, search: Path, place: Path, options: Any) -> list[str]:
    if recipe == "finetune":
        genotype = str(search / "genotype.json")
        own = shlex.split(options.finetune)
        return ["--genotype", genotype, *own, "--output_dir", str(place)]
    output = str(place / ("genotype.json" if recipe == "derive" else "report.html"))
    return ["--search_dir", str(search), "--output", output]


def _files(place: Path) -> dict[str, bytes]:
    """What is there, but TensorBoard's files: path from there -> content."""
    paths = [path for path in place.rglob("*") if path.is_file()]
    names = {str(path.relative_to(place)): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if "tfevents" not in name}


def _restore(place: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)


def _is_exact(name: str) -> bool:
    """Whether a file is the same whenever it is made: no times, no dates in it."""
    return name not in ("finetune.json", "README.md") and not name.endswith("/README.md")


def _mixed(recipe: str, left: dict[str, bytes], a: dict[str, bytes], b: dict) -> str | None:
    """What of the files that are left is of another run than the others, in words."""
    if recipe == "report" and (page := left.get("report.html")):
        pictures = [content for name, content in left.items() if name.endswith(".png")]
        whole = all(base64.b64encode(content) in page for content in pictures)
        return None if whole and page in (a["report.html"], b["report.html"]) else "pictures"
    possible = {"a", "b"}
    for name, content in left.items():
        if recipe != "report" and not name.startswith("checkpoint/") and "README.md" not in name:
            possible &= {run for run, files in (("a", a), ("b", b)) if _same(name, content, files)}
        if not possible:
            return name
    return None


def _same(name: str, content: bytes, files: dict[str, bytes]) -> bool:
    if name == "finetune.json" and name in files:  # times stand in it
        return json.loads(content)["genotype"] == json.loads(files[name])["genotype"]
    return files.get(name) == content


def _count(path: Path) -> None:
    """Write down how many operations there were so far, and the seconds that they took."""
    numbers, begun = itertools.count(1), time.monotonic()

    def act() -> None:
        path.write_text(json.dumps([next(numbers), time.monotonic() - begun]))

    _before_operations(act)


def _die(number: int, at: float | None, saved: Path) -> None:
    """Be killed before that operation, or at that time; `saved` is there once a step was saved."""
    numbers, write = itertools.count(), callbacks.write_whole

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save(*given) -> None:
        write(*given)
        saved.touch()

    callbacks.write_whole = save
    if at is None:
        _before_operations(lambda: kill() if next(numbers) == number else None)
        return
    timer = threading.Timer(at, kill)
    timer.daemon = True
    timer.start()


def _before_operations(act: Callable[[], None]) -> None:
    def watched(operation: Callable) -> Callable:
        def call(*given, **options):
            act()
            return operation(*given, **options)

        return call

    for name in OPERATIONS:
        setattr(os, name, watched(getattr(os, name)))


def _lost(left: dict[str, bytes], a: dict[str, bytes], saved: bool) -> str | None:
    """Whether a step that was saved is not there any more; of a finetune."""
    name = f"checkpoint/{WEIGHTS}"
    if not saved:
        return None
    whole = name in left and left[name] != a[name] and bool(load(left[name]))
    return None if whole else "the saved step is lost"
