"""recipes/accelerate_configs/: accelerate reads each file, and understands what we mean by it.
Not here: searches in several processes (../test_processes.py, test_search.py)."""

import os

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import (
    _validate_launch_command,
    launch_command_parser,
    prepare_multi_gpu_env,
)
from accelerate.utils import FullyShardedDataParallelPlugin
from recipes.conftest import ROOT

FOLDER = ROOT / "recipes" / "accelerate_configs"
PROCESSES = {"single": (1, 1), "ddp": (1, 2), "fsdp2": (1, 2), "multi_node": (2, 16)}


def test_these_are_all():
    assert {path.stem for path in FOLDER.iterdir()} == PROCESSES.keys()


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_reads_it(name):
    path = str(FOLDER / f"{name}.yaml")
    config = load_config_from_file(path)  # raises at a key that it does not know
    assert (config.num_machines, config.num_processes) == PROCESSES[name]
    assert config.mixed_precision == "no" and not config.use_cpu
    if name != "single":
        kind = "FSDP" if name == "fsdp2" else "MULTI_GPU"
        assert config.distributed_type == kind


def test_fsdp2_shards_layer_by_layer(monkeypatch):
    path = str(FOLDER / "fsdp2.yaml")
    args = launch_command_parser().parse_args(["--config_file", path, "search.py"])
    env = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    for name, value in env.items():
        if name not in os.environ:
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert not plugin.cpu_ram_efficient_loading
