"""The scaling benchmark on CPUs: one process, two under DDP and under FSDP2, all in one file.
Not here: any timing, nor that gradients are averaged rightly (../test_processes.py)."""

import json
import os

import pytest
from recipes.conftest import ROOT

from darts_lora import InputError

BENCHMARK = ROOT / "recipes" / "benchmark"
OPTIONS = ("--shape", "tiny", "--steps", 2, "--ranks", "[1, 2, 4]")
# accelerate keeps FSDP for GPUs, two_processes.py tells it to shard on CPUs as well
SHARDED = """
import scaling
from two_processes import accelerator
from darts_lora.base.options import run

def sharded(**options):
    made = accelerator(sharded=True, **options)
    made.state.fsdp_plugin.transformer_cls_names_to_wrap = None  # the model's own, as in fsdp2.yaml
    return made

scaling.Accelerator = sharded
scaling.SHAPES["tiny"].checkpointing = True
run(scaling.main, scaling.ScalingRun)
"""


@pytest.fixture
def scaling(monkeypatch):
    """The benchmark's module: a recipe is a script, its folder is no package."""
    monkeypatch.syspath_prepend(BENCHMARK)
    import scaling

    return scaling


def made_up(kind, processes, weights, bilevel, **others):
    """What a run measured: rows a second of all processes together."""
    setting = {"shape": "tiny", "ranks": [4, 8], "adapter_dtype": "float32", "device": "a GPU"}
    results = {
        step: {"ms": 10.0, "rows_per_second": rows, "peak_gib": [1.5, 2.5][:processes]}
        for step, rows in (("weights", weights), ("bilevel", bilevel))
    }
    found = {"kind": kind, "processes": processes, "torch": "2.11.0", "results": results}
    return {**setting, **found, **others}


def test_runs_of_one_and_two_processes_end_in_one_file(launch, scaling, tmp_path, monkeypatch):
    output, recipe = tmp_path / "scaling.json", tmp_path / "sharded.py"
    recipe.write_text(SHARDED)
    launch("benchmark/scaling", *OPTIONS, "--output", output, alone=True)
    launch("benchmark/scaling", *OPTIONS, "--output", output, processes=2)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(BENCHMARK), str(ROOT / "tests")]))
    sharded = os.path.relpath(recipe.with_suffix(""), ROOT / "recipes")
    done = launch(sharded, *OPTIONS, "--output", output, processes=2)
    records = json.loads(output.read_text())
    assert list(records) == ["tiny, single, 1", "tiny, ddp, 2", "tiny, fsdp2, 2"]
    for record in records.values():
        processes = 1 if record["kind"] == "single" else 2
        assert record["processes"] == record["launched"] == processes
        assert record["tensors"] == 49, "21 of the model, A and B of its 14 layers"
        assert record["sharded_tensors"] == (49 if record["kind"] == "fsdp2" else 0)
        assert record["adapter_dtype"] == "float32" and record["budget_rank"] == 2
        for step in ("weights", "bilevel"):
            result, alone = (r["results"][step] for r in (record, records["tiny, single, 1"]))
            assert 0 < result["q1"] <= result["ms"] <= result["q3"]
            assert result["rows_per_second"] == pytest.approx(
                2000 * processes / result["ms"], abs=1e-3
            )
            assert result["peak_gib"] == [None] * processes
            efficiency = scaling.efficiency(record, records, step)
            assert efficiency == pytest.approx(alone["ms"] / result["ms"], rel=1e-3)
            assert f"{efficiency:.2f}" in done.stdout
    for kind in ("single", "ddp", "fsdp2"):
        assert done.stdout.count(f" {kind} ") == 2, "a row for each step of each record"


def test_efficiency_is_that_of_a_process_beside_one_alone(scaling):
    runs = [
        made_up("single", 1, 100.0, 50.0),
        made_up("ddp", 4, 360.0, 160.0),
        made_up("fsdp2", 2, 100.0, 60.0),
        made_up("ddp", 2, 100.0, 60.0, adapter_dtype="bfloat16"),
    ]
    records = {str(number): run for number, run in enumerate(runs)}

    def found(run):
        return [scaling.efficiency(run, records, step) for step in ("weights", "bilevel")]

    assert [found(run) for run in runs] == [[1.0, 1.0], [0.9, 0.8], [0.5, 0.6], [None, None]]
    del records["0"]
    assert found(runs[1]) == [None, None], "nothing ran alone"


def test_the_slowest_process_counts(scaling):
    seen = [{"ms": ms, "q1": ms - 1, "q3": ms + 1, "peak_gib": ms / 2} for ms in (8.0, 10.0, 9.0)]
    assert scaling.joined(seen, rows=6) == {
        **{"ms": 10.0, "q1": 9.0, "q3": 11.0},
        **{"rows_per_second": 600.0, "peak_gib": [4.0, 5.0, 4.5]},
    }


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        (
            "shape",
            "large",
            "must be one of tiny, smollm2, llama_1b, llama_8b, mllama_11b, ",
        ),
        ("steps", 1, "must be an integer >= 2"),
        ("ranks", [4, 4], "must be distinct integers"),
    ],
)
def test_bad_options_are_refused(scaling, option, value, right):
    with pytest.raises(InputError) as error:
        scaling.ScalingRun(**{option: value})
    assert str(error.value).startswith(f"{option}={value!r}") and right in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"shape": "tiny", "results": []}', '{"a": {}}'])
def test_a_file_of_something_else_is_not_written_over(scaling, tmp_path, text):
    output = tmp_path / "speed.json"
    output.write_text(text)
    with pytest.raises(InputError, match=r"output='.*': holds no records of this benchmark; name"):
        scaling.main(scaling.ScalingRun(shape="tiny", output=str(output)))
    assert output.read_text() == text


def test_processes_that_accelerate_does_not_join_are_refused(scaling, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = scaling.torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="num_processes=2: accelerate runs 1, with a Linear of 0"):
        scaling.distribution(type("Alone", (), {"num_processes": 1}), model)
