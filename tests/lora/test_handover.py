"""Folding and cutting, in float64 against closed forms; every kind of layer against the supernet.
Not here: a genotype's weights in PEFT (test_genotype.py), a run that goes on (test_finetune.py)."""

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from darts_lora import InputError
from darts_lora.lora.handover import cut, fold
from darts_lora.lora.mixed_linear import MixedRankLinear


def layer(base):
    mixed = MixedRankLinear(base, (0, 1, 3, 5), dtype=torch.float64)
    nn.init.normal_(mixed.lora_B)
    mixed.alpha.data = torch.randn(4, dtype=torch.float64)
    mixed.membership = mixed.membership.double()
    return mixed


def four_bits():
    base = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    base.weight = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False, quant_type="nf4")
    return base.to("cpu")


BASES = {
    "linear": lambda: nn.Linear(12, 10).double(),
    "no bias": lambda: nn.Linear(9, 16, bias=False).double(),
    "conv1d": lambda: Conv1D(10, 12).double(),
    "4 bits": four_bits,
}


def in_peft(base, a, b, scaling):
    """PEFT's own layer around the base, with these weights."""
    options = {"fan_in_fan_out": isinstance(base, Conv1D), "target_modules": ["layer"]}
    config = LoraConfig(r=len(a), lora_alpha=scaling * len(a), **options)
    model = nn.ModuleDict({"layer": base})
    model.is_loaded_in_4bit = isinstance(base, bnb.nn.Linear4bit)
    layer = inject_adapter_in_model(config, model)["layer"]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    return layer


@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_the_folded_layer_is_the_supernets(kind):
    torch.manual_seed(0)
    base = BASES[kind]()
    mixed = layer(base)
    x = torch.randn(7, mixed.lora_A.shape[1], dtype=torch.float64)
    b = fold(mixed.lora_B, mixed.membership @ mixed.probabilities())
    plain, expected = base(x), mixed(x)
    assert (expected - plain).norm() > plain.norm() / 10
    assert (plain + mixed.scaling * x @ mixed.lora_A.T @ b.T - expected).abs().max() < 1e-12
    columns = 5
    a_cut, b_cut = cut(mixed.lora_A, b, columns)
    assert a_cut.shape == (columns, x.shape[1]) and b_cut.shape == (plain.shape[1], columns)
    adapted = in_peft(base, a_cut, b_cut, mixed.scaling)
    assert (adapted(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_cut_is_the_best_of_its_rank(batch):
    torch.manual_seed(0)
    a = torch.randn(*batch, 6, 14, dtype=torch.float64)
    b = torch.randn(*batch, 11, 6, dtype=torch.float64)
    for rank in range(7):
        a_cut, b_cut = cut(a, b, rank)
        lost = torch.linalg.matrix_norm(b @ a - b_cut @ a_cut)
        wanted = torch.linalg.svdvals(b @ a)[..., rank:].norm(dim=-1)
        assert torch.allclose(lost, wanted, atol=1e-12)
        if rank:
            norms = a.norm(dim=-1).mean(-1, keepdim=True)
            assert torch.allclose(a_cut.norm(dim=-1), norms.expand(*batch, rank))


def test_columns_of_zeros_are_none():
    a, b = torch.randn(8, 9), torch.randn(10, 8)
    a[5:], b[:, 5:] = 0, 0
    assert cut(a, b, 5)[0].shape == (5, 9)
    with pytest.raises(InputError, match="rank=6: the searched layer has 5 columns"):
        cut(a, b, 6)
    a_cut, b_cut = cut(a, torch.zeros(10, 8), 2)
    assert not b_cut.any() and a_cut.norm(dim=1).min() > 0, "an untrained layer stays trainable"
