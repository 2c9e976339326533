"""The examples for users of other trainers, run as they are, on a tiny model.
Not here: what the callback does (../test_trainer.py)."""

import json
import os
import subprocess
import sys

import pytest
from families import TEXT_FAMILIES, make_family
from peft import PeftModel
from recipes.conftest import ROOT
from transformers import AutoModelForCausalLM

from darts_lora import Genotype


@pytest.mark.parametrize("name", ["trainer", "sft"])
def test_an_example(name, tmp_path):
    model, question = make_family(TEXT_FAMILIES["llama"], str(tmp_path / "model")), "which colour"
    files = []
    for split, count in {"train": 24, "validation": 12}.items():
        colours = [("red", "green", "blue")[i % 3] for i in range(count)]
        rows = [{"prompt": question, "completion": colour} for colour in colours]
        if name == "trainer":
            rows = [{"text": f"{question} {colour}"} for colour in colours]
        files.append(tmp_path / f"{split}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / f"recipes/examples/{name}.py"), model, *map(str, files)],
        cwd=tmp_path, env={**env, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs" / name
    genotype = Genotype.load(folder / "checkpoint-40" / "genotype.json")
    assert f"{genotype.num_parameters:,} trainable parameters" in done.stdout
    adapted = {name: rank for name, rank in genotype.ranks.items() if rank}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder)
    layers = {n: m for n, m in loaded.base_model.model.named_modules() if hasattr(m, "r")}
    assert len(genotype.ranks) == 14
    assert {name: layer.r["default"] for name, layer in layers.items()} == adapted
    assert all(layer.lora_B["default"].weight.any() for layer in layers.values())


@pytest.mark.parametrize("name", ["trainer", "sft"])
def test_an_example_is_short(name):
    assert len((ROOT / f"recipes/examples/{name}.py").read_text().splitlines()) <= 20
