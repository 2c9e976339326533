"""Evaluation: loss and exact match against hand-made values, base beside adapter, errors."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from darts_lora.collator import IGNORED, Collator
from darts_lora.config import DataConfig, ModelConfig
from darts_lora.data import load_splits
from darts_lora.errors import InputError
from darts_lora.evaluate import EvaluateConfig, evaluate, score
from darts_lora.models import load_model, load_processor

DATA = DataConfig(max_test_samples=10)


@pytest.fixture(scope="module")
def rows():
    return load_splits(DATA, ["test"])["test"]


@pytest.fixture(scope="module")
def collator():
    return Collator(load_processor(ModelConfig()))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Folder of a rank-2 adapter that changes the model."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(load_model(ModelConfig()), config)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return str(folder), model.get_nb_trainable_parameters()[0]


def test_the_loss_is_the_mean_over_supervised_tokens_at_any_batch_size(rows, collator):
    model = load_model(ModelConfig())
    batch = collator([rows[i] for i in range(len(rows))])
    with torch.no_grad():
        expected = model(**batch).loss.item()
    for batch_size in (64, 3):
        result = score(model, rows, collator, batch_size=batch_size)
        assert result["loss"] == pytest.approx(expected, abs=1e-5)
        assert result["rows"] == 10
        assert result["supervised_tokens"] == int((batch["labels"] != IGNORED).sum())


class Parrot(nn.Module):
    """Answers each prompt with the reference, in turn with the next word of the vocabulary."""

    def __init__(self, collator, rows):
        super().__init__()
        self.tokenizer = collator.tokenizer
        _, answers = collator.prompts([rows[i] for i in range(len(rows))])
        self.answers = iter(answers)

    def forward(self, input_ids, **inputs):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, len(self.tokenizer)))

    def generate(self, input_ids, **inputs):
        new = []
        for i in range(len(input_ids)):
            answer = self.tokenizer(next(self.answers), add_special_tokens=False)["input_ids"]
            new.append(
                answer[:1] + [self.tokenizer.eos_token_id] if i % 2 == 0 else [answer[0]] * 2
            )
        return torch.cat([input_ids, torch.tensor(new)], dim=1)


def test_exact_match_counts_whole_answers(rows, collator):
    result = score(Parrot(collator, rows), rows, collator)
    assert result["exact_match"] == 0.5
    assert result["loss"] == pytest.approx(
        torch.tensor(float(len(collator.tokenizer))).log().item()
    )


def test_base_and_adapter_side_by_side(adapter, rows, collator):
    folder, parameters = adapter
    results = evaluate(EvaluateConfig(folder), ModelConfig(), DATA)
    base = score(load_model(ModelConfig()), rows, collator)
    assert results["base"] == {**base, "trainable_parameters": 0}
    assert results["adapter"]["trainable_parameters"] == parameters
    assert abs(results["adapter"]["loss"] - base["loss"]) > 1e-3
    with open(f"{folder}/evaluation.json") as file:
        assert json.load(file) == results
    alone = evaluate(EvaluateConfig(folder, compare_base=False), ModelConfig(), DATA)
    assert alone == {"adapter": results["adapter"]}


def test_bad_input(adapter, tmp_path):
    with pytest.raises(InputError, match="eval_batch_size=0: must be an integer >= 1"):
        EvaluateConfig(eval_batch_size=0)
    with pytest.raises(InputError, match="max_new_tokens=0: must be an integer >= 1"):
        EvaluateConfig(max_new_tokens=0)
    with pytest.raises(InputError, match="run `accelerate launch recipes/finetune.py` first"):
        evaluate(EvaluateConfig(str(tmp_path)), ModelConfig(), DATA)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["no_such_layer"]})
    )
    with pytest.raises(InputError, match="cannot be loaded into the model"):
        evaluate(EvaluateConfig(str(tmp_path)), ModelConfig(), DATA)
