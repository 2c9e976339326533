"""Which layers a search searches, and what it refuses.
Not here: the matching (test_targets.py), what is left out and why (test_probe.py)."""

import pytest
from test_supernet import bert, config, llama

from darts_lora import InputError, Supernet
from darts_lora.lora.targets import match_modules


def test_the_searched_layers_are_those_that_match():
    options = {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]}
    supernet = Supernet(llama(), config(**options))
    assert list(supernet.layers) == match_modules(llama(), *options.values())
    assert len(supernet.layers) == 3


def test_target_that_is_no_linear_layer():
    with pytest.raises(InputError, match=r"model\.norm is a LlamaRMSNorm, not a linear layer"):
        Supernet(llama(), config(target_modules=["q_proj", "model.norm"]))


def test_rank_above_a_layers_smaller_side_names_the_layer():
    with pytest.raises(InputError, match=r"rank 20 is above 16, .* of model\.layers\.0\."):
        Supernet(llama(), config(ranks=(1, 20)))


@pytest.mark.parametrize(
    "options", [{"target_modules": ["classifier"]}, {"modules_to_save": ["bert"]}]
)
def test_nothing_left_to_search(options):
    with pytest.raises(InputError, match=r"nothing is left to search, every match is"):
        Supernet(bert(), config(**options))
