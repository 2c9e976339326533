"""What the README shows is run: its Python, and its commands one after the other in one folder.
Not here: what the commands do in detail (recipes/), the installation (cli/test_wheel.py)."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import forked
import pytest
from families import TEXT_FAMILIES, make_family
from peft.tuners.lora import LoraLayer
from scipy import stats

from darts_lora import Genotype

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Full commands take minutes each: these options make them short.
SHORT = {
    "search": "--max_steps 16 --batch_size 8",
    "finetune": "--max_steps 4 --batch_size 8",
    "evaluate": "--max_test_samples 16",
    "derive": "",
    "report": "",
}
ENTRY_POINT = "import sys\nfrom darts_lora.cli import main\nsys.exit(main())\n"  # as pip writes it
MADE = {
    "search": "finetune/adapter_model.safetensors",
    "finetune": "scratch/adapter_model.safetensors",
    "evaluate": "finetune/evaluation.json",
    "derive": "search/genotype_rank1.json",
    "report": "search/report.html",
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    """Each command of the blocks of shell, as its parts, but the installation (.ci/run)."""
    joined = [re.sub(r"\\\n\s*", "", block) for block in blocks("bash")]
    lines = [part for block in joined for part in re.split(r"\n|&&", block)]
    parts = [shlex.split(line, comments=True) for line in lines]
    return [part for part in parts if part and part[:2] != ["pip", "install"]]


def test_with_peft(tmp_path, monkeypatch):
    """With a tiny model in the place of the hub's, and a shorter search."""
    example, _ = blocks("python")
    assert README[: README.index(example) + len(example)].count("\n") <= 40
    row = {"text": "which colour is it red"}
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * 40)
    model = make_family(TEXT_FAMILIES["llama"], str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    names = {}
    short = example.replace("Qwen/Qwen3-0.6B", model).replace("max_steps=1000", "max_steps=16")
    exec(compile(short, "README.md", "exec"), names)
    ranks = {m.r["default"] for m in names["model"].modules() if isinstance(m, LoraLayer)}
    assert len(ranks) > 1, "unlike ranks"


def test_the_loop_is_short_and_finds_what_it_says():
    _, example = blocks("python")
    assert len(example.splitlines()) <= 25
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), names)
    said = re.search(r"print\(genotype\.ranks\)  # (.*)", example).group(1)
    assert printed.getvalue().strip() == said
    assert names["lora_config"].r == 2


def test_every_command_is_run_here_or_by_ci():
    ours = [parts for parts in commands() if parts[0] == "darts-lora"]
    assert [parts[1] for parts in ours] == list(SHORT)
    others = [parts[:3] for parts in commands() if parts not in ours]
    dry_run = ["accelerate", "launch", "recipes/search.py"]
    assert others == [["pytest"], ["tensorboard", "--logdir", "runs/search"], dry_run]


@pytest.mark.parametrize("name", SHORT)
def test_the_commands_one_after_the_other(name, folder):
    """On the embedded default, each finds what the one before it left in runs/."""
    (parts,) = [parts for parts in commands() if parts[:2] == ["darts-lora", name]]
    (folder / "darts-lora").write_text(ENTRY_POINT)
    done = forked.run(folder / "darts-lora", *parts[1:], *SHORT[name].split(), folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "runs" / MADE[name]).is_file(), done.stdout
    if name == "search":
        genotype = Genotype.load(folder / "runs/search/genotype.json")
        assert genotype.num_parameters <= genotype.found_by["budget_parameters"]
        assert any((folder / "runs/search/tensorboard").iterdir())


def test_the_dry_run_on_ones_own_model_and_data(tmp_path):
    """With a tiny model in the place of the hub's."""
    (parts,) = [parts for parts in commands() if "--dry_run" in parts]
    model = make_family(TEXT_FAMILIES["qwen2"], str(tmp_path / "model"))
    for split in ("train", "test"):
        row = {"prompt": "which colour is it", "completion": "red"}
        (tmp_path / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 20)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    options = [model if part == "Qwen/Qwen3-0.6B" else part for part in parts[2:]]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, "--ranks", "[0,8]"],
        cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    assert "what is learnt of it:" in said and "searched layers" in said
    assert "14 layers, candidate ranks [0, 8]; budget" in said
    assert not (tmp_path / "runs" / "search" / "genotype.json").exists()


def test_the_table_of_results_is_that_of_the_cells():
    folder = ROOT / "recipes" / "benchmark" / "results" / "equal_cost"
    names = {"embedded": "embedded", "LLaVA": "llava"}
    names |= {"SmolLM2 on E2E": "e2e", "SmolLM2 on GSM8K": "gsm8k"}
    rows = re.findall(r"^\| ([\w ]+) \| rank (\d) \| (.*) \|$", README, flags=re.MULTILINE)
    assert len(rows) == 9
    for task, budget, shown in rows:
        found = {}
        steps, seeds, *losses, said, predicted, told = shown.replace("*", "").split(" | ")
        name = names[task] + "_long" * (steps == "2000")
        lines = (folder / f"{name}.jsonl").read_text("utf-8").splitlines()[1:]
        for cell in map(json.loads, lines):
            if cell["budget"] == int(budget):
                found.setdefault((cell["method"], cell["stage"]), {})[cell["seed"]] = cell
        uniform, run, search = (
            found[way] for way in (("uniform", "final"), ("one_run", "final"), ("one_run", "find"))
        )
        pairs = [(uniform[seed]["loss"], run[seed]["loss"]) for seed in run]
        differences = [own - other for other, own in pairs]
        error = stdev(differences) / len(pairs) ** 0.5 * stats.t.ppf(0.975, len(pairs) - 1)
        verdicts = [search[seed]["verdict"] for seed in run]
        learnt = sum(verdict["learnt"] for verdict in verdicts)
        assert int(seeds) == len(pairs) and told == f"{learnt} of {seeds}"
        passes = {int(steps) - search[seed]["run_steps"] for seed in run}
        assert all(0.015 < extra / int(steps) < 0.055 for extra in passes)
        figures = [*map(mean, zip(*pairs, strict=True)), mean(differences), error]
        figures.append(-mean(verdict["predicted_gain"] for verdict in verdicts))
        for text, figure in zip([*losses, *said.split(" ± "), predicted], figures, strict=True):
            assert f"{figure:.{len(text.partition('.')[2])}f}" == text.lstrip("+"), (task, text)


def test_what_it_links_to_exists():
    for page in [ROOT / "README.md", *(ROOT / "recipes").rglob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert link.startswith("http") or (page.parent / link).exists(), (page, link)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")
