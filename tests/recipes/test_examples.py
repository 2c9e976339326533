"""The examples for users of other trainers, run as they are, on a tiny model.
Not here: what the callback does (../test_trainer.py)."""

import json
import os
import subprocess
import sys

import pytest
from families import TEXT_FAMILIES, make_family
from recipes.conftest import ROOT

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
    genotype = Genotype.load(tmp_path / "runs" / name / "genotype.json")
    assert len(genotype.ranks) == 14 and str(genotype.ranks) in done.stdout
    assert genotype.num_parameters <= genotype.found_by["budget_parameters"]
    assert genotype.found_by["steps"] == 40
