"""The benchmark of all model types, on a sample of them; and that it finds faults.
Not here: the recipes on families of models (test_families.py)."""

import importlib
import json
import sys

import pytest

from darts_lora.lora import adapter

# of each task, sorts of attention, mixtures of experts (the first row), state spaces
SAMPLE = {
    "causal": "mixtral qwen3_moe deepseek_v3 gpt_oss olmoe llama4_text granitemoe gpt2 falcon "
    "mamba bamba opt gemma3_text",
    "image-text": "llava qwen2_vl mllama",
    "classification": "bert bart xlnet modernbert",
}
PAIRS = [(task, kind) for task, kinds in SAMPLE.items() for kind in kinds.split()]


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend("recipes/benchmark")
        yield importlib.import_module("model_types")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("task", "kind"), PAIRS)
def test_a_sample_of_all_types(benchmark, task, kind):
    record = benchmark.try_model(task, kind)
    assert (record.result, record.error) == ("right", None)
    assert record.layers and bool(record.experts) == (PAIRS.index((task, kind)) < 7)


def test_the_types_are_those_of_the_installed_release(benchmark):
    pairs = list(benchmark.pairs())
    assert len(set(pairs)) == len(pairs) > 300 and set(PAIRS) <= set(pairs)


@pytest.mark.filterwarnings("ignore")
def test_it_finds_an_adapter_that_is_another_one(benchmark, monkeypatch, tmp_path, capsys):
    """Without the way around what PEFT rewrites, and without a trial that would leave it out."""
    monkeypatch.setattr(adapter, "survives", lambda *_: True)
    monkeypatch.setattr(adapter, "_refusal", lambda *_: None)
    output = str(tmp_path / "out.jsonl")
    monkeypatch.setattr(sys, "argv", ["model_types.py", "--types", "mixtral", "--output", output])
    benchmark.main()
    with open(output, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    assert [record["kind"] for record in records] == ["mixtral", "mixtral"]
    for record in records:
        assert record["result"] == "refused" and "genotype: PEFT gives" in record["error"]
        assert record["plain_peft"] == "works"
    assert "refused: 2" in capsys.readouterr().out
