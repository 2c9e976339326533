"""recipes/benchmark/kill_test.py, small: runs killed at few moments end as those that were not.
Not here: 20 kills on the embedded default, stops in good order (test_search.py)."""

import importlib
import json
import os
import signal
import threading
import time

import pytest
from datasets.utils import tqdm as datasets_bar
from recipes.conftest import ROOT


@pytest.fixture(scope="module")
def kill_test():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes" / "benchmark")
        yield importlib.import_module("kill_test")


def test_a_search_that_is_killed_within_a_bars_lock_holds_up_no_other(kill_test, tmp_path):
    def start(within):
        if child := os.fork():
            return child
        kill_test._set_lock(kill_test.tqdm, threading.RLock())
        with datasets_bar.get_lock():
            (tmp_path / "within").touch()
            time.sleep(60 * within)
        os._exit(0)

    datasets_bar.get_lock()  # made here, and shared
    killed = start(within=True)
    while not (tmp_path / "within").exists():
        time.sleep(0.01)
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    other, deadline = start(within=False), time.monotonic() + 10
    while not (ended := os.waitpid(other, os.WNOHANG)[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    if not ended:
        os.kill(other, signal.SIGKILL)
    assert ended


def test_what_was_killed_ends_as_what_was_not(kill_test, vision_folder, data_folder, tmp_path):
    search = (
        f"--model_name_or_path {vision_folder} --dataset {data_folder} --ranks [0,2,4] "
        "--budget_rank 2 --max_steps 10 --search_fraction 0.5 --batch_size 4 --max_length 32 "
        "--save_steps 1"
    )
    kill_test.main(kill_test.KillTest(str(tmp_path), 3, search=search))
    runs = json.loads((tmp_path / "kill_test.json").read_text())["kills"]
    assert [run["place"] for run in runs] == list(kill_test.PLACES)
    assert all(run["equal"] for run in runs) and runs[1]["half_written"]
    assert not list(tmp_path.glob("*/checkpoints/*.darts_lora-tmp-*"))
    assert not list(tmp_path.glob("kill-*/finetune/checkpoints"))
