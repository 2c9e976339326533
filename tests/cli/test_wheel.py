"""The wheel alone, away from the checkout: the command, what it prints, find_ranks.
Not here: what a search does (tests/recipes/test_search.py), find_ranks itself."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from darts_lora import Genotype

ROOT = Path(__file__).parents[2]
SCRIPT = """
import darts_lora, torch, transformers
from peft import get_peft_model
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = transformers.LlamaForCausalLM(config)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (32, 8))]
options = {"budget_rank": 2, "max_steps": 16, "batch_size": 4}
found = darts_lora.find_ranks(model, rows[:24], rows[24:], **options)
adapted = get_peft_model(model, found)
print(darts_lora.__file__, adapted.get_nb_trainable_parameters()[0])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the wheel was unpacked into."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("src", "whl", "lib"))
    shutil.copytree(
        ROOT / "darts_lora", source / "darts_lora", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    unpack = [*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel]
    subprocess.run(unpack, check=True, capture_output=True)
    return target


@pytest.fixture
def run(installed, tmp_path):
    def run(*command):
        env = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=env, capture_output=True)
        out, err = done.stdout.decode(), done.stderr.decode()  # a bar returns within its line
        assert done.returncode == 0, err[-3000:]
        return out, err

    return run


def test_the_command_searches_the_embedded_default_and_prints_few_lines(run, installed, tmp_path):
    """As many lines for any number of steps: those of data, layers and result. 16 of 800 steps,
    each with a record and a checkpoint."""
    every_step = ("--max_steps", 16, "--logging_steps", 1, "--save_steps", 1)
    out, err = run(installed / "bin" / "darts-lora", "search", *every_step)
    genotype = Genotype.load(tmp_path / "runs" / "search" / "genotype.json")
    assert len(genotype.ranks) == 53
    lines = 4 + (4 + 19) + 4  # rows and layers, 4 parts of 24 module types (6 in one row), result
    assert out.count("\n") == lines and lines + err.count("\n") < 40
    bars = r"(\r(Loading weights|search): [^\r\n]*|\n)*"
    assert re.fullmatch(bars, err), err


def test_ranks_are_found_in_a_script(run, installed, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    file, parameters = run(sys.executable, script)[0].split()
    assert Path(file).is_relative_to(installed) and int(parameters) > 0
