"""Every YAML of recipes/configs and accelerate_configs: it is read, and understood as we mean it.
Not here: what a recipe does with them (test_search.py, ../test_processes.py)."""

import os
import shlex

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import (
    _validate_launch_command,
    launch_command_parser,
    prepare_multi_gpu_env,
)
from accelerate.utils import FullyShardedDataParallelPlugin
from recipes.conftest import ROOT

from darts_lora import SearchConfig
from darts_lora.base.options import load_config, parse
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig

CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
ACCELERATE = ROOT / "recipes" / "accelerate_configs"
PROCESSES = {"single": (1, 1), "ddp": (1, 2), "fsdp2": (1, 2), "multi_node": (2, 16)}
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


def test_there_is_one_for_each_kind_of_launch():
    assert {path.stem for path in ACCELERATE.iterdir()} == PROCESSES.keys()


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_reads_it(name):
    path = str(ACCELERATE / f"{name}.yaml")
    config = load_config_from_file(path)  # raises at a key that it does not know
    assert (config.num_machines, config.num_processes) == PROCESSES[name]
    assert config.mixed_precision == "no" and not config.use_cpu
    if name != "single":
        kind = "FSDP" if name == "fsdp2" else "MULTI_GPU"
        assert config.distributed_type == kind


def test_fsdp2_shards_layer_by_layer(monkeypatch):
    path = str(ACCELERATE / "fsdp2.yaml")
    args = launch_command_parser().parse_args(["--config_file", path, "search.py"])
    env = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    for name, value in env.items():
        if name not in os.environ:
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert not plugin.cpu_ram_efficient_loading
