"""The model card beside an adapter: it renders, says what is true, and loads what it is beside.
Not here: the upload (../run/test_hub.py), the figures themselves (../test_evaluate.py)."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn

from darts_lora import Genotype, InputError
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.evaluate import EvaluateConfig, evaluate
from darts_lora.finetune import FinetuneConfig, finetune
from darts_lora.lora.adapter import adapted_ranks
from darts_lora.lora.models import load_model
from darts_lora.views.card import remove_card, update_figures, write_card

TRAINING = TrainingConfig(max_steps=2, batch_size=4, logging_steps=1, learning_rate=0.02)
RECORD = {"rank": None, "steps": 2, "trainable_parameters": 24, "loss": 0.5}
FIGURES = {"loss": 0.25, "exact_match": None, "trainable_parameters": 24, "rows": 9}


@pytest.fixture(scope="module")
def evaluated(base_config, data, tmp_path_factory):
    """Folders of a finetune with ranks 0, 2 and 4, and of one of rank 2, both evaluated."""
    folder = tmp_path_factory.mktemp("card")
    modules = load_model(base_config).named_modules()
    names = [name for name, m in modules if isinstance(m, nn.Linear) and name != "lm_head"]
    found = Genotype({name: (0, 2, 4)[i % 3] for i, name in enumerate(names)})
    found.found_by["budget_parameters"] = 12345
    found.save(folder / "genotype.json")
    own, uniform = (str(folder / name) for name in ("own", "uniform2"))
    config = FinetuneConfig(str(folder / "genotype.json"), output_dir=uniform, rank=2)
    finetune(config, base_config, data, TRAINING)
    evaluate(EvaluateConfig(uniform, exact_match=False), base_config, data)
    config = replace(config, output_dir=own, rank=None)
    model, record = finetune(config, base_config, data, TRAINING)
    options = EvaluateConfig(own, exact_match=False, baseline=uniform)
    results = evaluate(options, base_config, data)
    return folder, own, uniform, model, record, results


def card(folder):
    with open(f"{folder}/README.md", encoding="utf-8") as file:
        return file.read()


def tables(folder):
    """The cells of each table, as the card is rendered."""
    body = card(folder).split("---\n", 2)[2]
    page = MarkdownIt("commonmark").enable("table").render(body)
    assert "<h2>Figures</h2>" in page and '<img src="ranks.png"' in page
    found = []
    for table in re.findall(r"<table>.*?</table>", page, flags=re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
        found.append([re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in rows])
    return found


def test_what_a_card_says(evaluated, base_config):
    folder, own, uniform, model, record, results = evaluated
    about, figures, ranks = tables(own)
    facts = {row[0]: row[1] for row in about if row}
    assert facts["base model"] == base_config.model_name_or_path.rsplit("/", 1)[1]
    assert facts["task"] == "image-text-to-text" and facts["budget"] == "12,345 parameters"
    assert facts["trainable parameters"] == f"{record['trainable_parameters']:,}"
    assert facts["licence"].startswith("unknown") and facts["variant"] == "plain LoRA"
    assert [row[0] for row in figures] == ["model", "base", "adapter", "baseline uniform2"]
    assert {row[4] for row in figures[1:]} == {"12"}, "test rows of each"
    shown = {row[0]: row[1] for row in figures[1:]}
    assert shown["base"] == f"{results['base']['loss']:.4f}"
    assert shown["adapter"] == f"{results['adapter']['loss']:.4f}"
    with open(f"{uniform}/evaluation.json") as file:
        assert shown["baseline uniform2"] == f"{json.load(file)['adapter']['loss']:.4f}"
    said = [int(rank) for row in ranks[1:] for rank in row[1].split()]
    with open(folder / "genotype.json") as file:
        assert sorted(said) == sorted(json.load(file)["ranks"].values())
    held = sum(int(row[3].replace(",", "")) for row in ranks[1:])
    assert held == record["trainable_parameters"]
    assert sum(rank > 0 for rank in said) == len(adapted_ranks(model))
    picture = np.asarray(Image.open(f"{own}/ranks.png"))
    assert picture.shape[0] > 50 and picture.std() > 10
    assert str(folder) not in card(own), "no path of this machine"


def test_the_figures_are_replaced_and_a_readme_of_others_stays(evaluated, tmp_path):
    (tmp_path / "README.md").write_text(card(evaluated[1]))
    update_figures(str(tmp_path), {"a | b": FIGURES})
    assert tables(tmp_path)[1][1:] == [["a | b", "0.2500", "-", "24", "9"]]
    for text in ("# mine", "<!-- end of figures --><!-- figures of evaluate.py -->"):
        (tmp_path / "README.md").write_text(text)
        update_figures(str(tmp_path), {"adapter": FIGURES})
        remove_card(str(tmp_path))
        assert (tmp_path / "README.md").read_text() == text
    (tmp_path / "README.md").unlink()
    update_figures(str(tmp_path), {"adapter": FIGURES})
    assert not (tmp_path / "README.md").exists()


def test_a_baseline_of_other_rows_is_refused(evaluated, base_config, data, tmp_path):
    own = evaluated[1]
    (tmp_path / "config.yaml").write_text("dataset: other\n")
    with pytest.raises(InputError, match=r"^baseline=.*has dataset='other', this adapter has"):
        evaluate(EvaluateConfig(own, baseline=str(tmp_path)), base_config, data)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"no evaluation\.json there"):
        evaluate(EvaluateConfig(own, baseline=str(tmp_path)), base_config, data)


@pytest.fixture
def embedded():
    return get_peft_model(
        load_model(ModelConfig()), LoraConfig(r=1, target_modules=["fc1"], use_dora=True)
    )


def test_the_example_loads_the_adapter_that_it_is_beside(embedded, tmp_path):
    embedded.save_pretrained(tmp_path)
    options = (ModelConfig(), DataConfig(), TRAINING, None, RECORD)
    write_card(str(tmp_path), embedded, *options)
    (example,) = re.findall(r"```python\n(.*?)```", card(tmp_path), flags=re.DOTALL)
    names = {}
    exec(example.replace("THIS FOLDER OR HUB NAME", str(tmp_path)), names)
    ours, theirs = embedded.state_dict(), names["model"].state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if "lora_" in key)
    data = ModelCard(card(tmp_path)).data
    assert data.license == "unknown" and data.library_name == "peft" and data.base_model is None


def test_hub_names_stand_in_the_cards_head_and_markup_in_names_is_text(embedded, tmp_path):
    model, data = ModelConfig("Qwen/Qwen3-0.6B"), DataConfig("user/rows", "a|b<img src=x>_c_")
    write_card(str(tmp_path), embedded, model, data, TRAINING, None, RECORD)
    head = ModelCard(card(tmp_path)).data
    assert head.base_model == "Qwen/Qwen3-0.6B" and head.datasets == ["user/rows"]
    assert ".from_pretrained('Qwen/Qwen3-0.6B')" in card(tmp_path)
    assert "<img src=x>" not in card(tmp_path)
    facts = {row[0]: row[1] for row in tables(tmp_path)[0] if row}
    assert facts["variant"] == "<code>use_dora</code>"
    assert facts["data"] == "user/rows, a|b&lt;img src=x&gt;_c_"
    data = DataConfig("json", data_files={"train": "/home/me/rows.jsonl"})
    write_card(str(tmp_path), embedded, model, data, TRAINING, None, RECORD)
    assert "/home/me" not in card(tmp_path) and "rows.jsonl" in card(tmp_path)
    assert ModelCard(card(tmp_path)).data.datasets is None
