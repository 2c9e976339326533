"""Every YAML of recipes/configs: it opens with its command, its options exist and are valid.
Not here: what a recipe does with them (test_search.py), nor parsing itself (../test_options.py)."""

import shlex

import pytest
from recipes.conftest import ROOT

from darts_lora import SearchConfig
from darts_lora.base.options import load_config, parse
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig

CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
CLASSES = (SearchConfig, ModelConfig, DataConfig, TrainingConfig)


def test_there_is_one_for_each_case():
    names = {path.stem for path in CONFIGS}
    wanted = {"smollm2", "llama_3_2_11b_vision_ocrvqa", "qwen2_5_vl", "qlora"}
    assert names == wanted


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration(path):
    objects = parse(["--config", str(path)], *CLASSES)
    resolved = {name: value for config in objects for name, value in vars(config).items()}
    for name, value in load_config(path).items():
        found = resolved[name]
        assert (list(found) if isinstance(found, tuple) else found) == value, name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_opens_with_the_command_that_launches_it(path):
    lines = [line.removeprefix("# ") for line in path.read_text().splitlines()]
    command = next(line for line in lines if not line.startswith("pip install"))
    parts = shlex.split(command)
    expected = ["accelerate", "launch", "recipes/search.py", "--config"]
    assert parts[:5] == [*expected, str(path.relative_to(ROOT))]
    options = [p for i, p in enumerate(parts[5:]) if p.startswith("--")]
    assert set(options) <= {"--data_files", "--model_name_or_path", "--dataset"}
