"""recipes/benchmark/kill_test.py, small: a search killed at two moments ends as one that was not.
Not here: 20 kills of the embedded default (run by hand), stops in good order (test_search.py)."""

import importlib.util
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
    path = ROOT / "recipes" / "benchmark" / "kill_test.py"
    spec = importlib.util.spec_from_file_location("kill_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_a_killed_search_ends_bitwise_as_the_other(kill_test, vision_folder, data_folder, tmp_path):
    search = (
        f"--model_name_or_path {vision_folder} --dataset {data_folder} --ranks [0,2,4] "
        "--budget_rank 2 --max_steps 10 --batch_size 4 --max_length 32 --save_steps 1"
    )
    kill_test.main(kill_test.KillTest(str(tmp_path), kills=2, search=search))
    (early, inside) = json.loads((tmp_path / "kill_test.json").read_text())["kills"]
    assert early["equal"] and inside["equal"]
    assert inside["half_written"] and not list(tmp_path.glob("*/checkpoints/*.darts_lora-tmp-*"))
