"""Kills recipes by SIGKILL at random moments, and compares what comes out with one that was not.
Not here: what a killed finetune, derive or report may leave (kill_results.py); the recipes, which
run whole in processes that are killed.

python recipes/benchmark/kill_test.py                # 20 kills of each recipe, half inside a write
"""

import json
import os
import random
import runpy
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from kill_results import KILLED, kill_results
from tqdm import tqdm

from darts_lora import InputError
from darts_lora.base.files import check_writable, write_json
from darts_lora.base.options import run
from darts_lora.run.checkpoint import checkpoints
from darts_lora.views.tensorboard import TensorBoard  # noqa: F401 - not in each process

RECIPES = Path(__file__).parents[1]
RESULTS = ("genotype.json", "supernet.safetensors")  # ranks; weights and alpha
PATIENCE = 1800  # seconds until a search counts as hung


@dataclass
class KillTest:
    """How often, and what."""

    output_dir: str = "runs/kill_test"
    """Folder of the runs and of kill_test.json."""
    kills: int = 20
    """Runs of each recipe that are killed once each; every second one inside a write."""
    seed: int = 0
    """Seed of the moments."""
    search: str = "--max_steps 24 --batch_size 8 --save_steps 1 --logging_steps 4"
    """Options of recipes/search.py."""
    finetune: str = "--max_steps 8 --save_steps 1 --pad_to_max"
    """Options of recipes/finetune.py."""


def main(options: KillTest) -> None:
    """Is a search that was killed and resumed bit for bit the one that was not? Does a finetune,
    derive or report that was killed leave files of one run alone, and end as one that was not?"""
    folder, moments = Path(check_writable(options.output_dir)), random.Random(options.seed)
    whole = folder / "whole"
    first = _start(whole, options.search)
    began = _first_write(first, whole)
    _finish(first)
    seconds = time.monotonic() - began
    records = []
    for kill in range(options.kills):
        cut, at = folder / f"kill-{kill}", moments.uniform(0, 0.9) * seconds
        record = {"kill": kill, "in_write": kill % 2 == 1}
        while not (killed := _kill(_start(cut, options.search), cut, record["in_write"], at)):
            at /= 2  # it had ended: this one was quicker
        record |= killed
        left = checkpoints(str(cut))
        _finish(_start(cut, options.search, resume=bool(left)))
        record |= {"resumed_from": os.path.basename(left[-1]) if left else None}
        record["equal"] = all(_same(whole / name, cut / name) for name in RESULTS)
        records.append(record)
        print(json.dumps(record), flush=True)
    equal, inside = (sum(record[name] for record in records) for name in ("equal", "half_written"))
    print(f"{equal} of {len(records)} bitwise equal, {inside} killed inside a write", flush=True)
    another = folder / "another"
    _finish(_start(another, f"{options.search} --seed 1"))
    for recipe in KILLED:
        found = kill_results(recipe, folder, whole, another, options, moments, (run_recipe, _end))
        print(f"{recipe}: {sum(r['right'] for r in found)} of {len(found)} right", flush=True)
        records += found
    write_json(folder / "kill_test.json", {"seconds": round(seconds, 1), "kills": records})
    wrong = [record for record in records if not record.get("equal", record.get("right"))]
    if wrong:
        raise InputError(f"output_dir={options.output_dir!r}: {len(wrong)} wrong, first {wrong[0]}")


def _start(folder: Path, search: str, resume: bool = False) -> int:
    """The search in a process of its own; its number."""
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    options = [*shlex.split(search), "--output_dir", str(folder), *["--resume"] * resume]
    return run_recipe("search", options, folder.parent / "log.txt")


def run_recipe(
    recipe: str, options: list[str], log: Path, first: Callable[[], None] = lambda: None
) -> int:
    """A recipe in a process of its own, where `first` is called before; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(1)  # threads of the forking process are not here
        _set_lock(tqdm, threading.RLock())
        log.parent.mkdir(exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        path = RECIPES / f"{recipe}.py"
        sys.argv = [str(path), *options]
        first()
        runpy.run_path(str(path), run_name="__main__")
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    finally:
        os._exit(status)  # nothing of the forking process's is tidied up here


def _set_lock(bars: type[tqdm], lock: threading.RLock) -> None:
    """Forked processes share tqdm's own: one that is killed within would hold up all others."""
    bars.set_lock(lock)
    for kind in bars.__subclasses__():
        _set_lock(kind, lock)


def _status(child: int, until: Callable[[], bool]) -> int | None:
    """The exit status of the search where it ends before `until()`; None: it is still there."""
    deadline = time.monotonic() + PATIENCE
    while not until():
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise InputError(f"search: hung for {PATIENCE} seconds; see log.txt in output_dir")
        time.sleep(0.0002)
    return None


def _end(child: int) -> int | None:
    """The exit status of the process, when it ends."""
    return _status(child, until=lambda: False)


def _finish(child: int) -> None:
    if status := _end(child):
        raise InputError(f"search: ended with status {status}; see log.txt in output_dir")


def _first_write(child: int, folder: Path) -> float:
    """When (monotonic seconds) the search began to write checkpoints."""
    if _status(child, until=(folder / "checkpoints").is_dir) is not None:
        raise InputError("search: ended before a checkpoint; see log.txt in output_dir")
    return time.monotonic()


def _kill(child: int, folder: Path, in_write: bool, at: float) -> dict | None:
    """Kill it `at` seconds behind its first write, or inside the write that comes next then; what
    it left. None: it had ended before."""
    began, place = _first_write(child, folder), folder / "checkpoints"

    def due() -> bool:
        return time.monotonic() - began >= at and (not in_write or _half_written(place))

    if _status(child, until=due) is not None:
        return None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {"seconds": round(time.monotonic() - began, 2), "half_written": _half_written(place)}


def _half_written(folder: Path) -> bool:
    return folder.is_dir() and any(".darts_lora-tmp-" in name for name in os.listdir(folder))


def _same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


if __name__ == "__main__":
    run(main, KillTest)
