"""What the README shows is run: its Python, and its commands one after the other in one folder.
Not here: what the commands do in detail (recipes/), nor the installation (.ci/run)."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from families import TEXT_FAMILIES, make_family

from darts_lora import Genotype

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Full commands take minutes each: these options make them short.
SHORT = {
    "recipes/search.py": "--max_steps 8 --batch_size 8",
    "recipes/finetune.py": "--max_steps 4 --batch_size 8",
    "recipes/evaluate.py": "--max_test_samples 16",
    "recipes/derive.py": "",
    "recipes/report.py": "",
}
# .ci/run; tests/recipes/test_planted.py, test_quality.py, test_random_mllama.py, test_speed.py
NOT_HERE = ("pytest", "tensorboard", "recipes/benchmark/planted.py", "recipes/benchmark/quality.py")
NOT_HERE += ("recipes/benchmark/quality_tables.py", "recipes/benchmark/random_mllama.py")
NOT_HERE += ("recipes/benchmark/speed.py",)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    joined = [re.sub(r"\\\n\s*", "", block) for block in blocks("bash")]
    lines = [part for block in joined for part in re.split(r"\n| && ", block) if part]
    return [line for line in lines if not line.startswith("pip install")]


def test_the_example_is_short_and_finds_what_it_says():
    (example,) = blocks("python")
    assert len(example.splitlines()) <= 25
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), names)
    said = re.search(r"print\(genotype\.ranks\)  # (.*)", example).group(1)
    assert printed.getvalue().strip() == said
    assert names["lora_config"].r == 2


def test_every_command_is_known():
    shown = {
        (re.search(r"recipes/\S+\.py", line) or re.match(r"\w+", line))[0] for line in commands()
    }
    assert shown == {*SHORT, *NOT_HERE}


@pytest.mark.parametrize("recipe", ["search", "finetune", "evaluate", "derive", "report"])
def test_the_commands_one_after_the_other(recipe, folder):
    """On the embedded default, each finds what the one before it left in runs/."""
    (line, *dry) = [line for line in commands() if f"recipes/{recipe}.py" in line]
    assert all("--dry_run" in line for line in dry)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        [*shlex.split(line), *SHORT[f"recipes/{recipe}.py"].split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = {
        "search": "search/genotype.json",
        "finetune": "finetune/adapter_model.safetensors",
        "evaluate": "finetune/evaluation.json",
        "derive": "search/genotype_rank1.json",
        "report": "search/report.html",
    }
    assert (folder / "runs" / made[recipe]).is_file(), done.stdout
    if recipe == "search":
        genotype = Genotype.load(folder / "runs/search/genotype.json")
        assert genotype.num_parameters <= genotype.found_by["budget_parameters"]


def test_the_dry_run_on_ones_own_model_and_data(tmp_path):
    """With a tiny model in the place of the hub's."""
    (line,) = [line for line in commands() if "--dry_run" in line]
    model = make_family(TEXT_FAMILIES["qwen2"], str(tmp_path / "model"))
    for split in ("train", "test"):
        row = {"prompt": "which colour is it", "completion": "red"}
        (tmp_path / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 20)
    parts = shlex.split(line.replace("Qwen/Qwen3-0.6B", model))
    parts[parts.index("recipes/search.py")] = str(ROOT / "recipes" / "search.py")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *parts[2:], "--ranks", "[0,8]"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "what is learnt of it:" in done.stdout and "searched layers" in done.stdout
    assert "14 layers, candidate ranks [0, 8]; budget" in done.stdout
    assert not (tmp_path / "runs" / "search" / "genotype.json").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("readme")
    (place / "recipes").symlink_to(ROOT / "recipes")
    return place
