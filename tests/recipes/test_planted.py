"""The planted-rank benchmark: its problems are what they say, and --quick finds the easy ranks.
Not here: how well searches do on the hard problems (recipes/benchmark/README.md)."""

import json

import numpy as np
import pytest
import torch


@pytest.fixture
def problems(benchmark_imports):
    import planted_problems

    return planted_problems


@pytest.fixture
def planted(benchmark_imports):
    import planted

    return planted


@pytest.mark.parametrize("difficulty", ["easy", "hard-1500", "hard-5000"])
def test_planted_ranks_are_the_true_ones(problems, difficulty):
    problem = problems.make_problem(problems.DIFFICULTIES[difficulty], seed=3)
    for name, rank in problem.ranks.items():
        assert np.linalg.matrix_rank(problem.changes[name].numpy(), tol=1e-4) == rank
    assert sorted(problem.ranks.values()) == sorted(problems.PLANTED)
    shapes = [problem.model.get_submodule(n).weight.shape for n in problem.ranks]
    costs = [r * sum(s) for r, s in zip(problem.ranks.values(), shapes, strict=True)]
    assert sum(costs) == problem.budget


def test_labels_come_from_the_planted_changes(problems):
    difficulty = problems.DIFFICULTIES["hard-1500"]
    problem = problems.make_problem(difficulty, seed=0)
    assert (len(problem.train), len(problem.validation)) == (1500, 750)
    with torch.no_grad():
        before = float(problems.mse(problem.model, (problem.test.x, problem.test.y)))
        for name, change in problem.changes.items():
            problem.model.get_submodule(name).weight += change
        after = float(problems.mse(problem.model, (problem.test.x, problem.test.y)))
    assert after == pytest.approx(difficulty.label_noise**2, rel=0.02)
    assert before > 1.5 * after


def test_problems_repeat_and_differ_by_seed(problems):
    state = torch.get_rng_state()
    first, again, other = (
        problems.make_problem(problems.DIFFICULTIES["easy"], seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.train.y, again.train.y) and first.ranks == again.ranks
    assert not torch.equal(first.train.y, other.train.y)
    assert torch.equal(state, torch.get_rng_state())  # the caller's random state is not touched


def test_uniform_ranks_use_the_budget(problems):
    problem = problems.make_problem(problems.DIFFICULTIES["easy"], seed=0)
    found = problems.uniform(problem, 0, problems.Training())
    assert list(found) == list(problem.ranks)
    assert sum(found.values()) == sum(problems.PLANTED)


def test_summary_divides_by_the_oracle_of_the_same_seed(planted):
    common = {"problem": "easy", "exact": 1.0, "parameters_of_budget": 1.0, "seconds": 1.0}
    rows = [("oracle", 0, 1.0), ("oracle", 1, 4.0), ("uniform", 0, 2.0), ("uniform", 1, 4.0)]
    rows += [("uniform", 2, 9.0)]  # its oracle is not there yet
    records = [{**common, "method": m, "seed": s, "test_loss": loss} for m, s, loss in rows]
    oracle, uniform = planted.summarise(records)
    assert (oracle["method"], oracle["loss_of_oracle"], oracle["seeds"]) == ("oracle", 1.0, 2)
    assert (uniform["loss_of_oracle_min"], uniform["loss_of_oracle_max"]) == (1.0, 2.0)
    assert (uniform["loss_of_oracle"], uniform["seeds"]) == (1.5, 2)


def test_unknown_names_are_told(launch):
    wrong = ("--problems", "[easy, nonesuch]")
    done = launch("benchmark/planted", *wrong, status=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    assert "nonesuch" in line


def test_quick_finds_the_easy_ranks(launch, tmp_path):
    done = launch("benchmark/planted", "--quick", "--output_dir", tmp_path)
    with open(tmp_path / "planted.json", encoding="utf-8") as file:
        result = json.load(file)
    assert set(result) == {"options", "seconds", "summary", "records"}
    assert {len(record["planted_ranks"]) for record in result["records"]} == {8}
    rows = {row["method"]: row for row in result["summary"]}
    row = rows["search"]
    assert row["exact"] == 1
    assert row["loss_of_oracle"] == pytest.approx(1.0, abs=1e-3)
    assert row["loss_of_oracle"] < 0.5 * rows["uniform"]["loss_of_oracle"]
    assert row["parameters_of_budget"] <= 1
    assert "search" in done.stdout
