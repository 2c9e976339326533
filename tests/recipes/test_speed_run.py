"""recipes/benchmark/speed_run.py on a CPU: it goes through both ways, and weighs what it timed.
Not here: any timing."""

import json

import pytest


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
