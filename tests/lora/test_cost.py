"""Costs and budgets against PEFT's count and closed forms.
Not here: how a search keeps within its budget (test_architect.py)."""

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from darts_lora import InputError
from darts_lora.lora.cost import rank_costs, resolve_budget


def test_costs_are_pefts_trainable_parameters():
    shapes = [(6, 5), (7, 3)]
    costs = rank_costs(shapes, (0, 1, 3))
    assert costs.shape == (2, 3) and costs[:, 0].eq(0).all()
    for i, (inside, outside) in enumerate(shapes):
        for k, rank in ((1, 1), (2, 3)):
            model = get_peft_model(
                nn.Sequential(nn.Linear(inside, outside)), LoraConfig(r=rank, target_modules=["0"])
            )
            assert costs[i, k] == model.get_nb_trainable_parameters()[0]


def test_budgets():
    costs = rank_costs([(6, 5), (7, 3)], (1, 4))
    assert resolve_budget(costs, 21, None, None) is None
    assert resolve_budget(costs, 21, 2.5, None) == 52.5
    assert resolve_budget(costs, 21, None, 84) == 84
    for rank, parameters in ((0.9, None), (4.1, None), (None, 20), (None, 85)):
        with pytest.raises(InputError, match="are outside what the candidates allow, 21 to 84"):
            resolve_budget(costs, 21, rank, parameters)
    with pytest.raises(InputError, match="give one of them"):
        resolve_budget(costs, 21, 2, 42)
