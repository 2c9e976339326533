"""An adapter of another model, or of other data, is not overwritten.
Not here: what a report sets side by side (test_runs.py)."""

import json

import pytest

from darts_lora import InputError
from darts_lora.config import DataConfig, ModelConfig
from darts_lora.finetune import FinetuneConfig, finetune
from darts_lora.run.together import check_not_anothers

OPTIONS = {"model_name_or_path": "m", "dataset": "d", "data_files": None, "test_split": "test"}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, None),
        ({"split_seed": 3}, None),
        ({"model_name_or_path": "n"}, "model_name_or_path='n'"),
        ({"dataset": "e"}, "dataset='e'"),
        ({"data_files": "f.json"}, "data_files='f.json'"),
    ],
)
def test_what_may_be_replaced(changed, told, tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps(OPTIONS | changed))
    configs = ModelConfig("m"), DataConfig("d")
    check_not_anothers(str(tmp_path), *configs)  # nothing was trained there
    (tmp_path / "adapter_config.json").write_text("{}")
    if told is None:
        return check_not_anothers(str(tmp_path), *configs)
    options = FinetuneConfig(genotype=None, rank=4, output_dir=str(tmp_path))
    with pytest.raises(
        InputError, match=f"an adapter with {told} is there, this run has .*='?[dmN]"
    ):
        finetune(options, *configs, None)


def test_an_adapter_of_another_tool_may_be_replaced(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    check_not_anothers(str(tmp_path), ModelConfig("m"), DataConfig("d"))
