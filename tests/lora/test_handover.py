"""Folding and cutting, in float64 against closed forms; every kind of layer against the supernet.
Not here: a genotype's weights in PEFT (test_genotype.py), a run that goes on (test_finetune.py)."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from darts_lora import InputError
from darts_lora.lora.handover import cut, fold
from darts_lora.lora.mixed_linear import MixedRankLinear


def layer(base, branches="nested"):
    mixed = MixedRankLinear(base, (0, 1, 3, 5), branches=branches, dtype=torch.float64)
    nn.init.normal_(mixed.lora_B)
    mixed.alpha.data = torch.randn(4, dtype=torch.float64)
    mixed.membership = mixed.membership.double()
    return mixed


@pytest.mark.parametrize("branches", ["nested", "independent"])
@pytest.mark.parametrize("base", [nn.Linear(12, 10), nn.Linear(9, 16, bias=False), Conv1D(10, 12)])
def test_the_folded_layer_is_the_supernets(base, branches):
    torch.manual_seed(0)
    base = base.double()
    mixed, x = layer(base, branches), torch.randn(7, base.weight.shape[0], dtype=torch.float64)
    if isinstance(base, nn.Linear):
        x = torch.randn(7, base.in_features, dtype=torch.float64)
    gates = mixed.membership @ mixed.probabilities()
    b = fold(mixed.lora_B, gates)
    expected = mixed(x)
    assert (base(x) + mixed.scaling * x @ mixed.lora_A.T @ b.T - expected).abs().max() < 1e-12
    columns = 5 if branches == "nested" else 9
    a_cut, b_cut = cut(mixed.lora_A, b, columns)
    assert a_cut.shape == (columns, x.shape[1]) and b_cut.shape == (base(x).shape[1], columns)
    assert (base(x) + mixed.scaling * x @ a_cut.T @ b_cut.T - expected).abs().max() < 1e-12


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
