"""What recipes/README.md shows: its commands parse, its options exist, its Python runs.
Not here: what the commands do (the files beside this one), the other README (../test_readme.py)."""

import inspect
import re
import shlex
import textwrap
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from recipes.conftest import ROOT

from darts_lora import Genotype, SearchConfig
from darts_lora.alpha import verdict
from darts_lora.alpha.verdict import verdict_text
from darts_lora.base.options import parse
from darts_lora.config import ModelConfig
from darts_lora.lora.models import load_model

README = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
# Programs that are not ours.
OTHERS = ("vllm", "tensorboard")
# Options of the parser itself, and TensorBoard's.
EVERYWHERE = {"config", "help", "logdir"}


def blocks(language):
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", README, flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def commands():
    """Every command in a block of shell, as its parts: without comments, line ends, `&&`."""
    joined = [re.sub(r"\\\n\s*", "", block) for block in blocks("bash")]
    lines = [part for block in joined for part in re.split(r"\n|&&|>+ \S+", block)]
    return [parts for line in lines if (parts := shlex.split(line, comments=True))]


OURS = [parts for parts in commands() if parts[0] not in OTHERS]


def option_classes(recipe):
    """The dataclasses of a recipe's options: what the main() of its command takes, in order."""
    main = import_module(f"darts_lora.cli.{Path(recipe).stem}").main
    return [parameter.annotation for parameter in inspect.signature(main).parameters.values()]


def test_the_whole_path_is_shown_first():
    path = [parts[-1] if parts[-1].endswith(".py") else parts[1] for parts in OURS[:4]]
    assert path == [f"recipes/{name}.py" for name in ("search", "derive", "finetune", "evaluate")]


@pytest.mark.parametrize("parts", OURS, ids=" ".join)
def test_a_command_names_a_recipe_and_options_that_it_knows(parts, monkeypatch):
    monkeypatch.chdir(ROOT)  # a --config is relative to it
    launcher = ["accelerate", "launch"] if parts[0] == "accelerate" else ["python"]
    recipe, *options = parts[len(launcher) :]
    assert parts[: len(launcher)] == launcher and (ROOT / recipe).is_file()
    classes = option_classes(recipe)
    # parse itself refuses options that do not exist, and values that are out of their bounds
    assert [type(found) for found in parse(options, *classes)] == classes


def test_options_in_the_text_exist():
    text = re.sub(r"^ *```.*?^ *```", "", README, flags=re.DOTALL | re.MULTILINE)
    spans = " ".join(re.findall(r"`([^`\n]+)`", text))
    shown = set(re.findall(r"--([a-z_]+)(?![a-z_-])", spans))  # with a hyphen inside: vLLM's
    recipes = ("search", "derive", "finetune", "evaluate")
    known = {f.name for recipe in recipes for c in option_classes(recipe) for f in fields(c)}
    assert {"dry_run", "resume", "pad_to_max", "report_to"} <= shown <= known | EVERYWHERE


def test_every_option_of_a_search_stands_in_its_table():
    table = README[README.index("The options of a search, ") :]
    count, names = re.search(r"(\d+) in all", table), re.findall(r"^\| `(\w+)` \|", table, re.M)
    known = [option.name for option in fields(SearchConfig)]
    assert names[: len(known)] == known and int(count[1]) == len(known) <= 20


def test_what_it_says_of_the_verdict_is_said():
    shown = re.findall(r"`((?:These ranks|Too early)[^`]*)`", README)
    figures = {"predicted_gain": 0.022, "predicted_gain_error": 0.004, "validation_loss": 0.1}
    figures |= {"architecture_steps": 7, "chosen_parameters": 8, "budget_parameters": 9}
    figures |= {"chance": 1.0, "adapter_gain": 1.0}
    kinds = [{"early": False, "learnt": True}, {"early": False, "learnt": False}, {"early": True}]
    texts = [verdict_text(figures | kind) for kind in kinds]
    assert [text.startswith(start) for text, start in zip(texts, shown, strict=True)] == [True] * 3
    (path,) = re.findall(r"`darts_lora\.alpha\.verdict\.(\w+)`", README)
    probability = getattr(verdict, path)(torch.ones(20, 3) + torch.randn(20, 3) / 9)
    assert probability <= verdict.CHANCE == 0.01 and verdict.FEWEST == 8
    assert verdict.LEAST == 1e-3 and verdict.CONFIDENCE == 0.05


@pytest.mark.parametrize("page", ["docs/reliability.md", "docs/contributing.md", "SECURITY.md"])
def test_tests_and_folders_that_a_page_names_exist(page):
    text = (ROOT / "recipes" / page).read_text(encoding="utf-8")
    tests = {path.relative_to(ROOT / "tests").as_posix() for path in ROOT.glob("tests/**/*.py")}
    tests |= {name.rpartition("/")[2] for name in tests} | {f"tests/{name}" for name in tests}
    named = set(re.findall(r"`((?:[\w/]+/)?test_\w+\.py)`", text))
    assert named and named <= tests
    modules = set(re.findall(r"`((?:cli|views|run|data|alpha|lora|base)/[\w.]*)`", text)) - named
    assert [name for name in modules if not (ROOT / "darts_lora" / name).exists()] == []


def test_files_that_it_names_exist():
    named = set(re.findall(r"`((?:configs|benchmark|recipes|docs)/[\w./]*)`", README))
    assert named and all((ROOT / "recipes" / n).exists() or (ROOT / n).exists() for n in named)


@pytest.fixture
def in_runs(tmp_path, monkeypatch):
    """The folder runs of an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_the_python_on_a_finetuned_adapter(in_runs):
    example, _ = blocks("python")
    adapted = get_peft_model(load_model(ModelConfig()), LoraConfig(r=2, target_modules=["fc1"]))
    adapted.save_pretrained(in_runs / "finetune")
    exec(compile(example, "recipes/README.md", "exec"), {})
    merged = load_model(ModelConfig("runs/merged"))
    assert [name for name, _ in merged.named_parameters() if "lora" in name] == []
    assert (in_runs / "finetune" / "padded" / "adapter_config.json").is_file()


def test_the_python_on_a_genotype(in_runs):
    _, example = blocks("python")
    names = [n for n, _ in load_model(ModelConfig()).named_modules() if n.endswith("fc1")]
    Genotype(dict.fromkeys(names, 3)).save(in_runs / "search" / "genotype.json")
    exec(compile(example, "recipes/README.md", "exec"), {})
    assert LoraConfig.from_pretrained(in_runs / "untrained").r == 3
