"""recipes/evaluate.py: the table and the file, adapter beside base.
Not here: how loss and exact match are counted (../test_evaluate.py)."""

import json
import shutil

import pytest

from darts_lora.config import DataConfig, ModelConfig
from darts_lora.evaluate import EvaluateConfig, evaluate


@pytest.fixture(scope="module")
def evaluated(finetuned, launch):
    folder, _ = finetuned
    done = launch("evaluate", "--adapter", folder, "--eval_batch_size", 5)
    return done, json.loads((folder / "evaluation.json").read_text())


def test_model_and_data_are_those_of_the_finetune(evaluated, finetuned, vision_folder, data_folder):
    _, results = evaluated
    parameters = json.loads((finetuned[0] / "finetune.json").read_text())["trainable_parameters"]
    assert results["adapter"]["trainable_parameters"] == parameters
    assert results["base"]["trainable_parameters"] == 0
    assert results["adapter"]["rows"] == results["base"]["rows"] == 12
    assert results["adapter"]["loss"] < results["base"]["loss"], "four steps must help"
    config = EvaluateConfig(str(finetuned[0]), eval_batch_size=12)
    again = evaluate(config, ModelConfig(vision_folder), DataConfig(data_folder))
    for name in ("base", "adapter"):
        assert again[name]["loss"] == pytest.approx(results[name]["loss"], abs=1e-5)
        assert again[name]["exact_match"] == results[name]["exact_match"]


def test_the_table_shows_the_files_numbers(evaluated):
    done, results = evaluated
    assert "12 test rows" in done.stdout
    for name, result in results.items():
        (line,) = [x for x in done.stdout.splitlines() if f" {name} " in x]
        for text in (
            f"{result['loss']:.4f}",
            f"{result['exact_match']:.1%}",
            f"{result['trainable_parameters']:,}",
        ):
            assert f" {text} " in line
    assert "Traceback" not in done.stderr


def test_two_processes_count_each_row_of_a_stream_once(evaluated, finetuned, launch, tmp_path):
    """Of 12 rows one has 6, and batches of 5: the last ones are not full."""
    folder = tmp_path / "adapter"
    shutil.copytree(finetuned[0], folder)
    launch(
        *("evaluate", "--adapter", folder, "--eval_batch_size", 5, "--streaming", "true"),
        processes=2,
    )
    results = json.loads((folder / "evaluation.json").read_text())
    for name, alone in evaluated[1].items():
        assert results[name].pop("loss") == pytest.approx(alone["loss"], abs=1e-5)
        assert results[name] == {key: alone[key] for key in results[name]}
