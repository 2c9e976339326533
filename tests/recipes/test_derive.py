"""recipes/derive.py: another genotype from a finished search.
Not here: the choice itself (../test_discretize.py)."""

import json

import pytest
import yaml

from darts_lora import Genotype, discretize


def test_another_budget_from_the_same_search(launch, search_dir, tmp_path):
    output = tmp_path / "small.json"
    done = launch("derive", "--search_dir", search_dir, "--budget_rank", 2, "--output", output)
    searched, derived = Genotype.load(search_dir / "genotype.json"), Genotype.load(output)
    assert derived == discretize(searched, budget_rank=2)
    limit = 2 * sum(sum(shape) for shape in searched.shapes.values())
    assert derived.num_parameters <= limit < 4 * derived.num_parameters
    assert f"{derived.num_parameters:,} trainable parameters" in done.stdout
    assert f"finetune.py --genotype {output}" in done.stdout


def test_no_search_there_is_one_line_and_status_2(launch, tmp_path):
    done = launch("derive", "--search_dir", tmp_path, status=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    assert line.startswith(f"error: search_dir='{tmp_path}': has no genotype.json; run ")


@pytest.mark.parametrize(("form", "read"), [("axolotl", yaml.safe_load), ("peft", json.loads)])
def test_for_another_trainer_nothing_else_is_on_the_standard_output(
    launch, search_dir, tmp_path, form, read
):
    output = tmp_path / "genotype.json"
    options = ("--search_dir", search_dir, "--format", form, "--output", output)
    done = launch("derive", *options)
    pattern = {"axolotl": "lora_rank_pattern", "peft": "rank_pattern"}[form]
    assert read(done.stdout)[pattern] == Genotype.load(output).to_lora_config().rank_pattern
    assert "trainable parameters" in done.stderr and f"--genotype {output}" in done.stderr
