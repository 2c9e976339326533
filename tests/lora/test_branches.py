"""RankBranches: which columns a candidate has, also of layers narrower than the largest one.
Not here: what layers compute with them (test_mixed_linear.py, test_experts.py)."""

import itertools

import pytest
import torch
from torch import nn

from darts_lora import Architect, InputError, MixedRankLinear, SearchConfig, Supernet, discretize
from darts_lora.lora.cost import usable_ranks, usable_table


def test_a_candidate_above_a_layers_smaller_side_is_the_largest_that_fits():
    assert usable_ranks((16, 3), (0, 1, 2, 4, 8)) == [0, 1, 2, 2, 2]
    assert usable_ranks((4, 16, 3), (2, 4)) == [2, 2]  # of experts: their number is no side
    assert usable_ranks((16, 1), (0, 2, 4)) == [0, 0, 0]
    assert usable_table([(16, 8), (16, 3)], (1, 2, 5)).tolist() == [[1, 2, 5], [1, 2, 2]]


def test_a_narrow_layer_has_the_branches_that_fit():
    layer = MixedRankLinear(nn.Linear(16, 3), (0, 1, 2, 4, 8))
    wide = MixedRankLinear(nn.Linear(16, 16), (0, 1, 2, 4, 8))
    assert layer.ranks == (0, 1, 2) and layer.membership.shape == wide.membership.shape
    assert layer.membership.sum(0).tolist() == [0, 1, 2, 2, 2]
    used = layer.membership.any(1)
    assert layer.lora_A[~used].eq(0).all() and layer.lora_A[used].ne(0).all()


def test_a_search_of_a_narrow_layer_beside_wide_ones():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3), nn.Linear(3, 1))
    config = SearchConfig(ranks=(0, 2, 4, 8), budget_rank=2)
    with pytest.warns(UserWarning, match="left out: 3: no candidate above 0 is at most 1"):
        supernet = Supernet(model, config)
    assert list(supernet.layers) == ["0", "2"]
    architect, x = Architect(supernet, 3), itertools.repeat(torch.randn(32, 16))
    for layer in supernet.layers.values():
        nn.init.normal_(layer.lora_B[:, layer.membership.any(1)])
    for _ in range(3):
        architect.step(lambda x: (model(x) - 1).square().mean(), x)
    assert supernet.alpha.isfinite().all()
    assert float(supernet.expected_parameters()) == pytest.approx(supernet.budget, rel=1e-5)
    genotype = discretize(supernet)
    assert genotype.ranks["2"] <= 2 and genotype.num_parameters <= supernet.budget
    assert genotype.ranks["0"] > 0  # the wide layer has all candidates
    state = genotype.inherited_state(supernet)
    assert all(value.any(0).any() for key, value in state.items() if "lora_A" in key)


def test_a_rank_that_no_layer_fits_is_refused():
    with pytest.raises(InputError, match=r"rank 32 is above 16, .* of 0 .* no layer is wider"):
        Supernet(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1)), SearchConfig(ranks=(0, 32)))
