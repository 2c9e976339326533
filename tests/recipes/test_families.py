"""The whole path by the recipes for each family of models: search, derive, finetune, evaluate.
Not here: the models (../families.py); what each recipe promises (the files beside this one)."""

import json
import runpy
import sys

import pytest
import torch
from families import (
    IMAGE_FAMILIES,
    MOE_FAMILIES,
    TEXT_FAMILIES,
    TORCHVISION_FAMILIES,
    bert,
    make_family,
)
from peft import PeftModel
from safetensors.torch import load_file

from darts_lora import Genotype
from darts_lora.config import DataConfig, ModelConfig
from darts_lora.data.loaders import load_splits, make_collator
from darts_lora.lora.models import load_model
from small_models import COLOURS, vision_rows

FAMILIES = {**TEXT_FAMILIES, "bert": bert, **IMAGE_FAMILIES, **TORCHVISION_FAMILIES}
FAMILIES |= MOE_FAMILIES


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of rows: text, labels, images."""
    root = tmp_path_factory.mktemp("rows")
    colours = [list(COLOURS)[i % 3] for i in range(24)]
    rows = {
        "text": [{"prompt": "which colour is it please", "completion": c} for c in colours],
        "labels": [{"text": f"it is {c}", "label": i % 3} for i, c in enumerate(colours)],
    }
    for name, source in rows.items():
        (root / name).mkdir()
        for split in ("train", "test"):
            text = "".join(json.dumps(row) + "\n" for row in source)
            (root / name / f"{split}.jsonl").write_text(text)
    (root / "images").mkdir()
    for split in ("train", "test"):
        vision_rows(24).to_parquet(root / "images" / f"{split}.parquet")
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_path(family, sources, tmp_path, monkeypatch, capsys):
    folder = make_family(FAMILIES[family], str(tmp_path / "model"))
    text = {**TEXT_FAMILIES, **MOE_FAMILIES}
    kind = "labels" if family == "bert" else "text" if family in text else "images"
    runs = {name: str(tmp_path / name) for name in ("search", "finetune")}

    def recipe(name, **options):
        given = [part for option, value in options.items() for part in (f"--{option}", str(value))]
        monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py", *given])
        runpy.run_path(f"recipes/{name}.py", run_name="__main__")
        return capsys.readouterr().out

    source = {"model_name_or_path": folder, "dataset": str(sources / kind)}
    steps = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "logging_steps": 2}
    search = {"ranks": "[0,1,2,4]", "budget_rank": 1, "output_dir": runs["search"]}
    if family in MOE_FAMILIES:
        shown = recipe("search", **source, **steps, **search, dry_run="true")
        assert "no adapter reaches" in shown and "experts that are not searched" in shown
        search["target_parameters"] = "all-experts"
    shown = recipe("search", **source, **steps, **search, dry_run="true")
    assert "searched layers" in shown and "uniform rank 1:" in shown
    assert {"labels": "its label:"}.get(kind, "what is learnt of it:") in shown
    assert not (tmp_path / "search" / "genotype.json").exists()
    recipe("search", **source, **steps, **search)
    genotype = recipe("derive", search_dir=runs["search"], budget_rank=2).split("Genotype: ")[1]
    genotype = genotype.split(".json")[0] + ".json"

    trained = []
    save = PeftModel.save_pretrained
    monkeypatch.setattr(
        PeftModel, "save_pretrained", lambda self, *a: trained.append(self) or save(self, *a)
    )
    recipe("finetune", genotype=genotype, output_dir=runs["finetune"])
    recipe("evaluate", adapter=runs["finetune"])
    results = json.loads((tmp_path / "finetune" / "evaluation.json").read_text())
    assert results["adapter"]["loss"] < results["base"]["loss"], "it learns"
    assert results["adapter"]["rows"] == 24
    ranks = Genotype.load(genotype).ranks.values()
    assert any(ranks) and max(ranks) <= 4
    experts = Genotype.load(genotype).stacked
    assert bool(experts) == (family in MOE_FAMILIES)
    reached = load_file(tmp_path / "finetune" / "adapter_model.safetensors")
    assert any(".experts." in key for key in reached) == bool(experts)

    model = ModelConfig(folder)
    rows = list(load_splits(DataConfig(source["dataset"]), ["test"])["test"])
    batch = make_collator(model, DataConfig())(rows[:6])
    reloaded = PeftModel.from_pretrained(load_model(model), runs["finetune"])
    with torch.no_grad():
        logits = [m.eval()(**batch).logits for m in (trained[-1], reloaded)]
        base = load_model(model)(**batch).logits
    assert torch.allclose(*logits, atol=1e-5) and not torch.allclose(base, logits[0], atol=1e-3)
    merged = reloaded.merge_and_unload()
    assert torch.allclose(merged(**batch).logits, logits[0], atol=1e-4)
