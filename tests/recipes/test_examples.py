"""The examples for users of other trainers, run as they are, on a tiny model.
Not here: what the callback does (../test_trainer.py)."""

import json
import re

import forked
import pytest
from families import TEXT_FAMILIES, make_family
from peft import PeftModel
from recipes.conftest import ROOT
from transformers import AutoModelForCausalLM

from darts_lora import Genotype


def run_example(name, folder, row, *more):
    """What an example prints: on a tiny model, and rows of questions with three answers."""
    model, question = make_family(TEXT_FAMILIES["llama"], str(folder / "model")), "which colour"
    files = []
    for split, count in {"train": 24, "validation": 12}.items():
        colours = [("red", "green", "blue")[i % 3] for i in range(count)]
        files.append(folder / f"{split}.jsonl")
        files[-1].write_text("".join(json.dumps(row(question, c)) + "\n" for c in colours))
    script = ROOT / "recipes" / "examples" / f"{name}.py"
    done = forked.run(script, model, *files, *more, folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def load_adapter(folder, name):
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    loaded = PeftModel.from_pretrained(base, folder / "runs" / name)
    modules = loaded.base_model.model.named_modules()
    return loaded, {n: m.r["default"] for n, m in modules if hasattr(m, "r")}


ROWS = {
    "trainer": lambda question, colour: {"text": f"{question} {colour}"},
    "sft": lambda question, colour: {"prompt": question, "completion": colour},
    "dpo": lambda question, colour: {"prompt": question, "chosen": colour, "rejected": "grey"},
}


@pytest.mark.parametrize("name", list(ROWS))
def test_an_example(name, tmp_path):
    printed = run_example(name, tmp_path, ROWS[name])
    genotype = Genotype.load(tmp_path / "runs" / name / "checkpoint-40" / "genotype.json")
    assert f"{genotype.num_parameters:,} trainable parameters" in printed
    adapted = {name: rank for name, rank in genotype.ranks.items() if rank}
    loaded, found = load_adapter(tmp_path, name)
    assert len(genotype.ranks) == 14 and found == adapted
    assert all(
        module.lora_B["default"].weight.any()
        for module in map(loaded.get_submodule, (f"base_model.model.{name}" for name in adapted))
    )


def test_optuna_ends_bad_trials_early_and_keeps_the_adapter_of_the_best(tmp_path):
    pytest.importorskip("optuna")
    printed = run_example("tune", tmp_path, ROWS["sft"], "4")
    told = re.findall(
        r"^(\d) (COMPLETE|PRUNED) ([\d.]+) .*?'budget_rank': (\d)", printed, re.MULTILINE
    )
    assert len(told) == 4 and {state for _, state, *_ in told} == {"COMPLETE", "PRUNED"}
    ended = {int(n): float(loss) for n, state, loss, _ in told if state == "COMPLETE"}
    best = min(ended, key=ended.get)
    assert printed.splitlines()[-1] == f"best: runs/tune/{best}"
    _, found = load_adapter(tmp_path, f"tune/{best}")
    assert found
    saved = {int(path.parent.name) for path in tmp_path.glob("runs/tune/*/adapter_config.json")}
    assert saved == set(ended)


@pytest.mark.parametrize("name", list(ROWS))
def test_an_example_is_short(name):
    assert len((ROOT / f"recipes/examples/{name}.py").read_text().splitlines()) <= 20
