"""A genotype as other trainers take it: their files give the same LoraConfig, and train its ranks.
Not here: what recipes/derive.py prints where (recipes/test_recipes.py)."""

import json

import pytest
import torch
import yaml
from datasets import Dataset
from families import TEXT_FAMILIES, make_family, make_moe
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from darts_lora import Genotype, InputError
from darts_lora.config import ModelConfig
from darts_lora.lora.adapter import adapted_ranks
from darts_lora.lora.models import load_model
from darts_lora.views.formats import axolotl_yaml, peft_json

RANKS = {"model.0.up": 4, "model.1.up": 0, "model.0.down+": 2, "model.1.down+": 1}


def axolotl_config(text):
    """The LoraConfig that axolotl makes of these options."""
    options = yaml.safe_load(text)
    assert options.pop("adapter") == "lora"
    rank, alpha = options.pop("lora_r"), options.pop("lora_alpha")
    numbers = [rank, alpha, *options["lora_rank_pattern"].values()]
    numbers += options["lora_alpha_pattern"].values()
    assert all(type(number) is int and number > 0 for number in numbers)
    rest = {name.removeprefix("lora_"): value for name, value in options.items()}
    return LoraConfig(r=rank, lora_alpha=alpha, **rest)


@pytest.mark.parametrize("saved", [[], ["head"]])
def test_the_same_configuration_comes_of_either_form(saved):
    genotype = Genotype(RANKS, scaling=2.0, modules_to_save=saved)
    wanted = genotype.to_lora_config()
    assert axolotl_config(axolotl_yaml(genotype)) == wanted
    assert LoraConfig(**json.loads(peft_json(genotype))) == wanted


def test_experts_are_target_parameters():
    ranks = {"layers.0.experts.down_proj": 2, "layers.0.q_proj": 1}
    shapes = {"layers.0.experts.down_proj": (4, 8, 8), "layers.0.q_proj": (8, 8)}
    genotype = Genotype(ranks, shapes=shapes)
    config = axolotl_config(axolotl_yaml(genotype))
    assert config.target_parameters == ["layers.0.experts.down_proj"]
    assert config == genotype.to_lora_config()


def test_an_alpha_that_is_no_integer():
    genotype = Genotype(RANKS, scaling=1.5)
    with pytest.raises(InputError, match=r"^format='axolotl': takes integers .* 1\.5 in a layer"):
        axolotl_yaml(genotype)
    assert LoraConfig(**json.loads(peft_json(genotype))) == genotype.to_lora_config()


def test_a_trainer_with_plain_peft_resumes_from_an_untrained_adapter(tmp_path):
    model = ModelConfig(make_family(TEXT_FAMILIES["llama"], str(tmp_path / "llama")))
    base = load_model(model)
    names = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and "head" not in n]
    genotype = Genotype({n: (0, 1, 3)[i % 3] for i, n in enumerate(names)})
    before = {n: (id(p), p.requires_grad) for n, p in base.named_parameters()}
    genotype.save_untrained(base, tmp_path / "untrained")
    assert {n: (id(p), p.requires_grad) for n, p in base.named_parameters()} == before

    resumed = PeftModel.from_pretrained(base, tmp_path / "untrained", is_trainable=True)
    ranks = {name: rank for name, rank in genotype.ranks.items() if rank}
    assert adapted_ranks(resumed) == ranks
    ids = torch.randint(0, 11, (4, 7))
    assert torch.equal(resumed.eval()(ids).logits, load_model(model).eval()(ids).logits)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    args = TrainingArguments(
        str(tmp_path / "trained"), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(resumed, args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    state = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    for name, rank in ranks.items():
        a, b = (state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert len(a) == b.shape[1] == rank and b.any(), name
    assert len(state) == 2 * len(ranks)


def test_an_untrained_adapter_of_experts(tmp_path):
    base = make_moe("mixtral")
    ranks = {"model.layers.0.mlp.experts.down_proj": 2, "model.layers.1.self_attn.q_proj": 1}
    Genotype(ranks).save_untrained(base, tmp_path)
    loaded = PeftModel.from_pretrained(make_moe("mixtral"), tmp_path)
    assert adapted_ranks(loaded) == ranks
