"""Benchmarks in small. kill_test.py: runs killed at few moments end as those that were not.
model_types.py: a sample of all types, and that it finds faults. speed_run.py on a CPU: it goes
through both ways, and weighs what it timed.
Not here: any timing, 20 kills, all types; planted ranks and quality (files beside this one)."""

import importlib
import json
import os
import signal
import sys
import threading
import time

import pytest
from datasets.utils import tqdm as datasets_bar

from darts_lora.lora import adapter


@pytest.fixture(scope="module")
def kill_test(benchmark_imports):
    return importlib.import_module("kill_test")


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


# of each task, sorts of attention, mixtures of experts (the first row), state spaces
SAMPLE = {
    "causal": "mixtral qwen3_moe deepseek_v3 gpt_oss olmoe llama4_text granitemoe gpt2 falcon "
    "mamba bamba opt gemma3_text",
    "image-text": "llava qwen2_vl mllama",
    "classification": "bert bart xlnet modernbert",
}
PAIRS = [(task, kind) for task, kinds in SAMPLE.items() for kind in kinds.split()]


@pytest.fixture(scope="module")
def model_types(benchmark_imports):
    return importlib.import_module("model_types")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("task", "kind"), PAIRS)
def test_a_sample_of_all_types(model_types, task, kind):
    record = model_types.try_model(task, kind)
    assert (record.result, record.error) == ("right", None)
    assert record.layers and bool(record.experts) == (PAIRS.index((task, kind)) < 7)


def test_the_types_are_those_of_the_installed_release(model_types):
    pairs = list(model_types.pairs())
    assert len(set(pairs)) == len(pairs) > 300 and set(PAIRS) <= set(pairs)


@pytest.mark.filterwarnings("ignore")
def test_it_finds_an_adapter_that_is_another_one(model_types, monkeypatch, tmp_path, capsys):
    """Without the way around what PEFT rewrites, and without a trial that would leave it out."""
    monkeypatch.setattr(adapter, "survives", lambda *_: True)
    monkeypatch.setattr(adapter, "_refusal", lambda *_: None)
    output = str(tmp_path / "out.jsonl")
    monkeypatch.setattr(sys, "argv", ["model_types.py", "--types", "mixtral", "--output", output])
    model_types.main()
    with open(output, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    assert [record["kind"] for record in records] == ["mixtral", "mixtral"]
    for record in records:
        assert record["result"] == "refused" and "genotype: PEFT gives" in record["error"]
        assert record["plain_peft"] == "works"
    assert "refused: 2" in capsys.readouterr().out


def test_both_ways_on_the_tiny_shape(launch, tmp_path):
    output = tmp_path / "speed_run.json"
    options = ("--shape", "tiny", "--batches", 2, "--passes", 1, "--rounds", 2, "--max_steps", 40)
    output.write_text('{"another task": {}}')
    launch("benchmark/speed_run", *options, "--budget_rank", 2, "--output", output)
    record = json.loads(output.read_text())
    assert list(record) == ["another task", "tiny, eager"], "a CPU has no graphs"
    found = record["tiny, eager"]
    assert (found["steps"], found["search_steps"], found["budget_rank"]) == (40, 5, 2)
    assert found["architecture_steps"] == 2, "of the three weight steps of the second half"
    kinds = {"plain", "search, weights", "search, mean", "search, architecture", "finetune"}
    assert set(found["ms"]) == kinds and min(found["ms"].values()) > 0
    assert found["once_s"]["last measurement"] > 0 < found["once_s"]["handover"]
    assert found["once_s"]["plain, graphs"] == 0
    assert 0.1 < found["ratio"] == found["ratio_with_graphs"]


def test_a_run_is_weighed_by_its_parts(benchmark_imports):
    from speed_run import Timed, summary

    passes = {"plain": [4.0, 2.0, 2.0], "search, weights": [6.0], "search, mean": [2.0]}
    passes |= {"search, architecture": [8.0], "finetune": [2.0, 2.0]}
    once = {"plain, built": [3.0], "search, built": [4.0], "handover": [7.0, 5.0, 5.0]}
    once |= {f"{kind}, graphs": [10.0] for kind in passes} | {"last measurement": [9.0]}
    found = summary(Timed(passes, once, {"plain": 2**30, "run": 2**31}), 2, (100, 10, 3))
    assert found["ms"]["plain"] == 1000 and found["plain_s"] == 103
    assert found["one_run_s"] == 10 * (3 + 1) + 2 * 4 + 9 + 90 * 1 + 4 + 5
    assert found["ratio"] == pytest.approx(156 / 103, abs=1e-4)
    assert found["ratio_with_graphs"] == pytest.approx(186 / 113, abs=1e-4)
    assert found["peak_gib"] == {"plain": 1.0, "run": 2.0} and found["peak_ratio"] == 2


def test_bad_options_are_told(launch, tmp_path):
    done = launch("benchmark/speed_run", "--shape", "nonesuch", status=2)
    assert "shape='nonesuch': must be one of tiny" in done.stderr
    only = ("--shape", "tiny", "--graphs", "[true]", "--output", tmp_path / "none.json")
    done = launch("benchmark/speed_run", *only, status=2)
    assert "graphs=[True]: there are none on a CPU" in done.stderr
