"""The examples for users of other trainers, run as they are, on a tiny model.
Not here: what the callback does (../test_trainer.py)."""

import ast
import json
import os
import subprocess
import sys

import pytest
from families import TEXT_FAMILIES, make_family
from peft import PeftModel
from recipes.conftest import ROOT
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("name", ["trainer", "sft", "dpo"])
def test_an_example(name, tmp_path):
    model, question = make_family(TEXT_FAMILIES["llama"], str(tmp_path / "model")), "which colour"
    files = []
    for split, count in {"train": 24, "validation": 12}.items():
        colours = [("red", "green", "blue")[i % 3] for i in range(count)]
        rows = [{"prompt": question, "completion": colour} for colour in colours]
        if name == "trainer":
            rows = [{"text": f"{question} {colour}"} for colour in colours]
        if name == "dpo":
            rows = [{"prompt": question, "chosen": c, "rejected": f"{c} {c}"} for c in colours]
        files.append(tmp_path / f"{split}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / f"recipes/examples/{name}.py"), model, *map(str, files)],
        cwd=tmp_path, env={**env, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = ast.literal_eval(done.stdout[done.stdout.rindex("{") :])
    adapted = {name: rank for name, rank in ranks.items() if rank}
    base = AutoModelForCausalLM.from_pretrained(model)
    loaded = PeftModel.from_pretrained(base, tmp_path / "runs" / name)
    found = {
        n: m.r["default"] for n, m in loaded.base_model.model.named_modules() if hasattr(m, "r")
    }
    assert len(ranks) == 14 and found == adapted
    assert all(
        module.lora_B["default"].weight.any()
        for module in map(loaded.get_submodule, (f"base_model.model.{name}" for name in adapted))
    )
