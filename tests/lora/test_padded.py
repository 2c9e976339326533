"""Padded adapters of others and of classifiers: the same outputs by one rank for all layers.
Not here: the weights alone (test_genotype.py), the folder of a finetune (test_finetune.py)."""

import pytest
import torch
from families import TEXT_FAMILIES, bert, make_family
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from darts_lora import Genotype
from darts_lora.config import ModelConfig
from darts_lora.lora.models import load_model
from darts_lora.lora.padded import save_padded


@pytest.mark.parametrize("use_rslora", [False, True])
def test_padding_a_saved_adapter_leaves_its_scaling_and_its_other_weights(tmp_path, use_rslora):
    folder = make_family(bert, str(tmp_path / "bert"))
    base, ids = load_model(ModelConfig(folder)), torch.randint(0, 11, (4, 7))
    names = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and ".layer." in n]
    found = Genotype({n: (1, 3, 5)[i % 3] for i, n in enumerate(names)}, scaling=0.7)
    adapted = get_peft_model(
        base, found.to_lora_config(base, task_type="SEQ_CLS", use_rslora=use_rslora)
    )
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            nn.init.normal_(parameter)
    expected = adapted.eval()(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    save_padded(str(tmp_path / "adapter"), str(tmp_path / "padded"))
    padded = PeftModel.from_pretrained(load_model(ModelConfig(folder)), tmp_path / "padded").eval()
    assert (padded(ids).logits - expected).abs().max() <= 1e-6 * expected.abs().max()
    for name in names:
        layer = padded.base_model.model.get_submodule(name)
        assert layer.r["default"] == 5
        assert layer.scaling["default"] == pytest.approx(0.7, rel=1e-12)
    assert LoraConfig.from_pretrained(tmp_path / "padded").use_rslora == use_rslora


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "alphas", [{"q_proj": 6}, {}, {"q_proj": 5, "layers.1.self_attn.v_proj": 7}]
)
def test_padding_an_adapter_whose_largest_rank_is_in_its_patterns(alphas, use_rslora, tmp_path):
    """As others write them: r is the smallest rank, alphas are not in proportion to the ranks."""
    wide = {"alpha_pattern": alphas, "rank_pattern": {"q_proj": 4}, "use_rslora": use_rslora}
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], **wide)
    folder = make_family(TEXT_FAMILIES["llama"], str(tmp_path / "llama"))
    ids = torch.randint(0, 11, (4, 7))
    adapted = get_peft_model(load_model(ModelConfig(folder)), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    expected = adapted.eval()(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    save_padded(str(tmp_path / "adapter"), str(tmp_path / "padded"))
    padded = PeftModel.from_pretrained(load_model(ModelConfig(folder)), tmp_path / "padded").eval()
    found = padded.peft_config["default"]
    assert found.r == 4 and not found.alpha_pattern and not found.rank_pattern
    assert found.lora_alpha == pytest.approx(3 * (2**0.5 if use_rslora else 2))
    assert (padded(ids).logits - expected).abs().max() <= 1e-5
