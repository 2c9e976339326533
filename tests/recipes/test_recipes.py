"""The recipes derive, finetune, evaluate and report: what a user gives, sees and gets; all --help.
Not here: search.py (test_search.py), what they do in detail (../test_finetune.py and others)."""

import json
import re
import shutil
from dataclasses import fields

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from darts_lora import Genotype, RankSearch, Supernet, discretize
from darts_lora.alpha.sizes import FIGURES
from darts_lora.base.options import load_config
from darts_lora.config import DataConfig, ModelConfig, SearchConfig, TrainingConfig
from darts_lora.evaluate import EvaluateConfig, evaluate
from darts_lora.finetune import FinetuneConfig
from darts_lora.lora.models import load_model
from small_models import residual

COMMON = {"help", "config"}
OWN = {
    "search": {"output_dir", "resume", "finetune_dir", "cuda_graphs", "report_to", "dry_run"},
    "report": {"search_dir", "finetune_dir", "output"},
    "derive": {
        "search_dir",
        "method",
        "budget_rank",
        "budget_parameters",
        "tolerance",
        "output",
        "format",
    },
    "finetune": set(),
    "evaluate": set(),
}
CONFIGS = {
    "search": (SearchConfig, ModelConfig, DataConfig, TrainingConfig),
    "report": (),
    "derive": (),
    "finetune": (FinetuneConfig, ModelConfig, DataConfig, TrainingConfig),
    "evaluate": (EvaluateConfig, ModelConfig, DataConfig),
}


def described(text):
    """Option name -> its description, without what the parser adds by itself (type, default)."""
    entries = re.split(r"^  (?:-h, )?--(\w+)", text, flags=re.MULTILINE)[1:]
    bodies = {}
    for name, body in zip(entries[::2], entries[1::2], strict=True):
        words = " ".join(body.split("\n\n")[0].split())
        words = re.sub(r"\((type|required|default)[: ].*", "", words)
        # a value's name in capitals or its choices stand before the description
        bodies[name] = re.sub(r"^([A-Z_]+(\.\w+)?|\{.*?\})(?= |$)", "", words).strip()
    return bodies


@pytest.mark.parametrize("recipe", list(OWN))
def test_every_option_has_a_description(launch, recipe):
    done = launch(recipe, "--help")
    found = described(done.stdout)
    assert set(found) == COMMON | OWN[recipe] | {f.name for c in CONFIGS[recipe] for f in fields(c)}
    assert [name for name, text in found.items() if len(text.split()) < 3] == []


def test_an_option_without_a_description_would_be_noticed():
    text = "  --rank RANK  (type: int, default: 1)\n  --seed SEED  Some seed here. (type: int)\n"
    assert described(text) == {"rank": "", "seed": "Some seed here."}


def test_another_budget_from_the_same_search(launch, search_dir, tmp_path):
    output = tmp_path / "small.json"
    done = launch("derive", "--search_dir", search_dir, "--budget_rank", 2, "--output", output)
    searched, derived = Genotype.load(search_dir / "genotype.json"), Genotype.load(output)
    assert derived == discretize(searched, budget_rank=2)
    limit = 2 * sum(sum(shape) for shape in searched.shapes.values())
    assert derived.num_parameters <= limit < 4 * derived.num_parameters
    assert f"{derived.num_parameters:,} trainable parameters" in done.stdout
    assert f"finetune.py --genotype {output}" in done.stdout


def test_another_tolerance_from_the_same_search(launch, search_dir, tmp_path):
    searched = Genotype.load(search_dir / "genotype.json")
    width = sum(sum(shape) for shape in searched.shapes.values())
    points = [
        {"rank": rank, "parameters": rank * width, "behind": behind}
        | {name: 0.0 for name in FIGURES if name != "behind"}
        for rank, behind in ((2, 0.03), (4, 0.0))
    ]
    sizes = {"base_loss": 1.0, "noise": 0.001, "tolerance": 0.01, "points": points}
    searched.found_by["sizes"] = sizes
    searched.save(tmp_path / "genotype.json")
    for tolerance, rank in ((0.02, 4), (0.04, 2)):
        output = tmp_path / f"{rank}.json"
        options = ("--search_dir", tmp_path, "--tolerance", tolerance, "--output", output)
        launch("derive", *options)
        wanted = discretize(searched, budget_parameters=rank * width)
        assert Genotype.load(output).ranks == wanted.ranks


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


def test_it_retrains_with_the_options_of_the_search(finetuned, vision_folder, search_dir):
    folder, _ = finetuned
    options = load_config(folder / "config.yaml")
    assert options["model_name_or_path"] == vision_folder
    assert (options["max_steps"], options["batch_size"], options["learning_rate"]) == (4, 8, 0.01)
    assert options["save_steps"] == 2, "given on the command line"
    assert options["seed"] == 0, "the search's seed is its own"
    record = json.loads((folder / "finetune.json").read_text())
    genotype = Genotype.load(search_dir / "genotype.json")
    assert record["trainable_parameters"] == genotype.num_parameters
    assert record["steps"] == 4 and record["rows"] == 40
    assert [step for step, _ in record["losses"]] == [2, 4]


def test_it_leaves_a_plain_peft_adapter(finetuned, vision_folder):
    folder, _ = finetuned
    model = PeftModel.from_pretrained(load_model(ModelConfig(vision_folder)), folder)
    state = load_file(folder / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in state.items() if "lora_A" in name} == {2, 4}
    assert any(t.abs().sum() > 0 for name, t in state.items() if "lora_B" in name)
    assert not (folder / "checkpoints").exists(), "they serve to get here"
    assert model.peft_config["default"].r == 4


def test_what_the_user_sees(finetuned, search_dir, vision_folder, data_folder):
    folder, done = finetuned
    assert f"not given are those of {search_dir / 'config.yaml'}\n" in done.stdout
    assert f"Model {vision_folder}, data {data_folder}\n" in done.stdout
    record = json.loads((folder / "finetune.json").read_text())
    assert f"{record['trainable_parameters']:,} trainable parameters" in done.stdout
    assert f"loss {record['loss']:.4f} after 4 steps" in done.stdout
    assert f"recipes/evaluate.py --adapter {folder}" in done.stdout
    assert re.search(r"4/4 \[\d+:\d+<00:00", done.stderr), "a bar with the time left"
    assert "Traceback" not in done.stderr and "{'" not in done.stdout + done.stderr


def test_two_processes_train_on_a_stream_and_go_on(launch, search_dir, tmp_path):
    """Their batches are of different lengths, each padded for itself."""
    options = ("--genotype", search_dir / "genotype.json", "--output_dir", tmp_path)
    options += ("--streaming", "true", "--batch_size", 2, "--logging_steps", 1)
    done = launch("finetune", *options, "--max_runtime", 0.0001, processes=2, status=75)
    kept = tmp_path / "checkpoints" / "checkpoint-1"
    assert f"stopped after step 1 of 4; the last checkpoint is {kept}, --resume" in done.stderr
    assert {"rng_state_0.pth", "rng_state_1.pth"} < {path.name for path in kept.iterdir()}
    launch("finetune", *options, "--resume", processes=2)
    record = json.loads((tmp_path / "finetune.json").read_text())
    assert record["steps"] == 4 and [step for step, _ in record["losses"]] == [1, 2, 3, 4]
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.fixture(scope="module")
def evaluated(finetuned, launch):
    folder, _ = finetuned
    done = launch("evaluate", "--adapter", folder, "--eval_batch_size", 5)
    return done, json.loads((folder / "evaluation.json").read_text())


def test_model_and_data_are_those_of_the_finetune(evaluated, finetuned, vision_folder, data_folder):
    _, results = evaluated
    parameters = json.loads((finetuned[0] / "finetune.json").read_text())["trainable_parameters"]
    assert results["adapter"]["trainable_parameters"] == parameters
    assert results["base"]["trainable_parameters"] == 0
    assert results["adapter"]["rows"] == results["base"]["rows"] == 12
    assert results["adapter"]["loss"] < results["base"]["loss"], "four steps must help"
    config = EvaluateConfig(str(finetuned[0]), eval_batch_size=12)
    again = evaluate(config, ModelConfig(vision_folder), DataConfig(data_folder))
    for name in ("base", "adapter"):
        assert again[name]["loss"] == pytest.approx(results[name]["loss"], abs=1e-5)
        assert again[name]["exact_match"] == results[name]["exact_match"]


def test_the_table_shows_the_files_numbers(evaluated):
    done, results = evaluated
    assert "12 test rows" in done.stdout
    for name, result in results.items():
        (line,) = [x for x in done.stdout.splitlines() if f" {name} " in x]
        for text in (
            f"{result['loss']:.4f}",
            f"{result['exact_match']:.1%}",
            f"{result['trainable_parameters']:,}",
        ):
            assert f" {text} " in line
    assert "Traceback" not in done.stderr


def test_two_processes_count_each_row_of_a_stream_once(evaluated, finetuned, launch, tmp_path):
    """Of 12 rows one has 6, and batches of 5: the last ones are not full."""
    folder = tmp_path / "adapter"
    shutil.copytree(finetuned[0], folder)
    launch(
        *("evaluate", "--adapter", folder, "--eval_batch_size", 5, "--streaming", "true"),
        processes=2,
    )
    results = json.loads((folder / "evaluation.json").read_text())
    for name, alone in evaluated[1].items():
        assert results[name].pop("loss") == pytest.approx(alone["loss"], abs=1e-5)
        assert results[name] == {key: alone[key] for key in results[name]}


@pytest.fixture
def searched(tmp_path):
    loader = torch.utils.data.DataLoader(torch.randn(32, 16), batch_size=8)
    RankSearch(
        Supernet(residual(), SearchConfig(ranks=(0, 1, 2), budget_rank=1, search_fraction=1.0)),
        loader,
        loader,
        training=TrainingConfig(max_steps=8, logging_steps=2),
        output_dir=str(tmp_path),
        loss_fn=lambda model, batch: (model(batch) - 1).pow(2).mean(),
    ).run()
    return tmp_path


def test_a_report(launch, searched):
    done = launch("report", "--search_dir", searched)
    assert done.stdout.strip() == f"Report: {searched}/report.html"
    assert "<h1>LoRA ranks found by" in (searched / "report.html").read_text()
    pictures = {path.name for path in (searched / "report_pictures").iterdir()}
    assert pictures == {"losses.png", "ranks.png", "worth.png"}


@pytest.mark.parametrize(
    ("recipe", "option", "text"),
    [
        ("derive", "search_dir", "has no genotype.json; run "),
        ("report", "search_dir", "no search's layers.json there"),
        ("finetune", "genotype", "no such file; run "),
        ("evaluate", "adapter", "no adapter_config.json there; run "),
    ],
)
def test_bad_input_is_one_line_and_status_2(launch, tmp_path, recipe, option, text):
    nothing = tmp_path / "nothing"
    done = launch(recipe, f"--{option}", nothing, status=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    assert line.startswith(f"error: {option}='{nothing}': {text}")
    assert not list(tmp_path.iterdir())
