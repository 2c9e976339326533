"""Kills runs by SIGKILL at random moments, and compares what comes out with one that was not.
A run is a search and its finetune in one process (search.py --finetune_dir).
Not here: the recipe, which runs whole in processes that are killed.

python recipes/benchmark/kill_test.py     # 20 kills, some inside a write or at the handover
"""

import contextlib
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
from tqdm import tqdm

from darts_lora import InputError
from darts_lora.base.files import check_writable, write_json
from darts_lora.base.options import run
from darts_lora.run.checkpoint import checkpoints, sealed
from darts_lora.views.tensorboard import TensorBoard  # noqa: F401 - not in each process

SEARCH = Path(__file__).parents[1] / "search.py"
FINETUNE = "finetune"  # its folder, in that of the search
# Ranks; weights and alpha; the adapter.
RESULTS = ("genotype.json", "supernet.safetensors", f"{FINETUNE}/adapter_model.safetensors")
PLACES = ("anywhere", "within a write", "at the handover")
PATIENCE = 1800  # seconds until a search counts as hung


@dataclass
class KillTest:
    """How often, and what."""

    output_dir: str = "runs/kill_test"
    """Folder of the runs and of kill_test.json."""
    kills: int = 20
    """Runs that are killed once each. Of three, one is inside the write of a checkpoint, and one
    between the search and the first checkpoint of its finetune."""
    seed: int = 0
    """Seed of the moments."""
    search: str = (
        "--max_steps 24 --search_fraction 0.5 --batch_size 8 --save_steps 1 --logging_steps 4"
    )
    """Options of recipes/search.py, of the whole run."""


def main(options: KillTest) -> None:
    """Is a run that was killed and resumed bit for bit the one that was not?"""
    folder, moments = Path(check_writable(options.output_dir)), random.Random(options.seed)
    whole = folder / "whole"
    first = _start(whole, options.search)
    began = _when(first, (whole / "checkpoints").is_dir)
    found = _when(first, (whole / RESULTS[0]).exists)
    handed_over = _when(first, lambda: bool(sealed(str(whole / FINETUNE))))
    _finish(first)
    spans = {place: time.monotonic() - began for place in PLACES}
    spans["at the handover"] = handed_over - found
    records = []
    for kill in range(options.kills):
        cut, place = folder / f"kill-{kill}", PLACES[kill % len(PLACES)]
        at = moments.uniform(0, 0.9) * spans[place]
        record = {"kill": kill, "place": place}
        while not (killed := _kill(_start(cut, options.search), cut, place, at)):
            at /= 2  # it had ended: this one was quicker
        record |= killed
        left = [*checkpoints(str(cut)), *sealed(str(cut / FINETUNE))]
        _finish(_start(cut, options.search, resume=bool(left)))
        record |= {"resumed_from": os.path.basename(left[-1]) if left else None}
        record["equal"] = all(_same(whole / name, cut / name) for name in RESULTS)
        records.append(record)
        print(json.dumps(record), flush=True)
    equal, inside = (sum(record[name] for record in records) for name in ("equal", "half_written"))
    print(f"{equal} of {len(records)} bitwise equal, {inside} killed inside a write", flush=True)
    write_json(folder / "kill_test.json", {"seconds": spans, "kills": records})
    wrong = [record for record in records if not record["equal"]]
    if wrong:
        raise InputError(f"output_dir={options.output_dir!r}: {len(wrong)} wrong, first {wrong[0]}")


def _start(folder: Path, search: str, resume: bool = False) -> int:
    """The run in a process of its own; its number."""
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    options = [*shlex.split(search), "--output_dir", str(folder), *["--resume"] * resume]
    options += ["--finetune_dir", str(folder / FINETUNE)]
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(1)  # threads of the forking process are not here
        _set_lock(tqdm, threading.RLock())
        folder.parent.mkdir(exist_ok=True)
        file = os.open(folder.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = [str(SEARCH), *options]
        runpy.run_path(sys.argv[0], run_name="__main__")
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


def _finish(child: int) -> None:
    if status := _status(child, until=lambda: False):
        raise InputError(f"search: ended with status {status}; see log.txt in output_dir")


def _when(child: int, happens: Callable[[], bool]) -> float:
    """When (monotonic seconds) that is so first."""
    if _status(child, until=happens) is not None:
        raise InputError("search: ended too early; see log.txt in output_dir")
    return time.monotonic()


def _kill(child: int, folder: Path, place: str, at: float) -> dict | None:
    """Kill it `at` seconds behind its first write, or behind the genotype, or inside the write that
    comes next then; what it left. None: it had ended before."""
    handover = place == "at the handover"
    start = (folder / RESULTS[0]).exists if handover else (folder / "checkpoints").is_dir
    began = _when(child, start)

    def due() -> bool:
        within = place != "within a write" or _half_written(folder)
        return time.monotonic() - began >= at and within

    if _status(child, until=due) is not None:
        return None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {"seconds": round(time.monotonic() - began, 2), "half_written": _half_written(folder)}


def _half_written(folder: Path) -> bool:
    """Whether a checkpoint of the search or of the finetune is."""
    with contextlib.suppress(FileNotFoundError):  # a run that ends removes them
        own, finetunes = folder / "checkpoints", folder / FINETUNE / "checkpoints"
        searches = own.is_dir() and any(".darts_lora-tmp-" in name for name in os.listdir(own))
        return searches or any(
            not (path / "checkpoint.json").exists() for path in finetunes.glob("checkpoint-*")
        )
    return False


def _same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


if __name__ == "__main__":
    run(main, KillTest)
