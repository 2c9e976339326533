"""Where a finetune begins: from which weights, and at which step of the run.
Not here: training from there (test_finetune.py), the weights themselves (test_handover.py)."""

import pytest

from darts_lora import Genotype, InputError, TrainingConfig
from darts_lora.run.beginning import FinetuneConfig, first_step, resolve_init


def found(**found_by):
    return Genotype({"layer": 1}, found_by=found_by)


PART, WHOLE = found(steps=5, run_steps=40), found(steps=40, run_steps=40)


@pytest.mark.parametrize(
    ("options", "genotype", "init"),
    [
        ({}, PART, "inherit"),
        ({}, WHOLE, "scratch"),
        ({}, found(), "scratch"),
        ({"init": "scratch"}, PART, "scratch"),
        ({"init": "inherit"}, WHOLE, "inherit"),
        ({"rank": 2}, PART, "scratch"),
        ({"rank": 2, "genotype": None}, None, "scratch"),
        *[({}, found(steps=odd, run_steps=40), "scratch") for odd in (0, -3, True, "5", 5.0, None)],
    ],
)
def test_a_run_goes_on_where_the_search_took_a_part_of_it(options, genotype, init):
    assert resolve_init(FinetuneConfig(**options), genotype) == init


def test_the_first_step_is_the_one_behind_the_search(tmp_path):
    config = FinetuneConfig(str(tmp_path / "genotype.json"), init="inherit")
    with pytest.raises(InputError, match=r"there is no .*supernet\.safetensors to go on from"):
        first_step(config, PART, TrainingConfig(max_steps=40))
    (tmp_path / "supernet.safetensors").write_bytes(b"")
    assert first_step(config, PART, TrainingConfig(max_steps=40)) == 5
    assert first_step(config, PART, TrainingConfig(max_steps=6)) == 5
    assert first_step(config, WHOLE, TrainingConfig(max_steps=40)) == 0
    for steps in (1, 5):
        with pytest.raises(InputError, match=f"max_steps={steps}: the run's steps, of which the"):
            first_step(config, PART, TrainingConfig(max_steps=steps))
    scratch = FinetuneConfig(config.genotype, init="scratch")
    assert first_step(scratch, PART, TrainingConfig(max_steps=5)) == 0
