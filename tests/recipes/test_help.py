"""--help of the recipes: every option is there, with a description.
Not here: what the options do."""

import re
from dataclasses import fields

import pytest

from darts_lora.config import DataConfig, ModelConfig, SearchConfig, TrainingConfig
from darts_lora.evaluate import EvaluateConfig
from darts_lora.finetune import FinetuneConfig

COMMON = {"help", "config"}
OWN = {
    "search": {"output_dir", "resume", "finetune_dir", "cuda_graphs", "report_to", "dry_run"},
    "report": {"search_dir", "finetune_dir", "output"},
    "derive": {"search_dir", "method", "budget_rank", "budget_parameters", "output", "format"},
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
