"""What PEFT makes of a choice of ranks, before a search and after each injection.
Not here: the genotype's own checks (test_genotype.py), experts (test_experts.py)."""

import pytest
import torch
import transformers as t
from families import MOE, TEXT, make_moe
from lora.test_probe import mamba
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from torch import nn

from darts_lora import InputError, SearchConfig, Supernet
from darts_lora.lora.adapter import adapted_ranks, add_lora, check_adapter, lora_config, refused
from darts_lora.lora.targets import match_modules
from small_models import residual

RANKS = {"blocks.0": 1, "blocks.1": 0, "blocks.2": 2}


def adapter(ranks, model=None, **options):
    config = lora_config({n: r for n, r in ranks.items() if r}, (), 2.0, **options)
    return get_peft_model(residual() if model is None else model, config)


def test_the_adapter_that_was_asked_for_passes():
    model = adapter(RANKS, modules_to_save=["blocks.3"])
    check_adapter(model, RANKS, ["blocks.3"])
    assert adapted_ranks(model) == {"blocks.0": 1, "blocks.2": 2}


@pytest.mark.parametrize(
    ("ranks", "saved", "message"),
    [
        ({**RANKS, "blocks.0": 2}, [], "gives blocks.0 rank 1, not 2"),
        ({**RANKS, "blocks.1": 1}, [], "gives blocks.1 rank 0, not 1"),
        ({**RANKS, "blocks.2": 0}, [], "gives blocks.2 rank 2, not 0"),
        ({"blocks.0": 1}, [], "gives blocks.2 rank 2, not 0"),
        (RANKS, ["blocks.3"], "does not train blocks.3 in full"),
    ],
)
def test_a_planted_mismatch_raises(ranks, saved, message):
    with pytest.raises(InputError, match=f"genotype: PEFT {message}"):
        check_adapter(adapter(RANKS), ranks, saved)


def test_whatever_else_is_trained_raises():
    model = adapter(RANKS)
    model.base_model.model.blocks[3].bias.requires_grad_(True)
    with pytest.raises(InputError, match=r"PEFT trains blocks\.3\.bias"):
        check_adapter(model, RANKS, [])
    with pytest.raises(InputError, match=r"trains blocks\.3\.modules_to_save"):
        check_adapter(adapter(RANKS, modules_to_save=["blocks.3"]), RANKS, [])


def test_each_injection_of_ours_is_looked_at(monkeypatch):
    """PEFT is made to do what its conversion of old names did: ranks of another layer."""
    own = LoraModel._create_and_replace

    def wrong(self, config, *args, current_key, **kwargs):
        own(self, config, *args, current_key=current_key.replace("blocks.0", "blocks.2"), **kwargs)

    config = lora_config({"blocks.0": 1, "blocks.2": 2}, (), 2.0)
    monkeypatch.setattr(LoraModel, "_create_and_replace", wrong)
    with pytest.raises(InputError, match=r"PEFT gives blocks\.0 rank 2, not 1"):
        add_lora(residual(), config, RANKS, [])


def test_what_peft_raises_is_one_line():
    config = LoraConfig(target_modules="nothing")
    with pytest.raises(InputError, match=r"genotype: PEFT refuses it .*nothing"):
        add_lora(residual(), config, {}, [])


def test_layers_that_peft_refuses_are_found_before_a_search():
    model = mamba()
    with pytest.warns(UserWarning, match="left out: .*out_proj: PEFT: .* incompatible with Mamba"):
        supernet = Supernet(model, SearchConfig(ranks=(0, 1, 2)))
    assert [name.rpartition(".")[2] for name in supernet.layers] == ["in_proj", "x_proj"]


def test_a_trial_changes_nothing_and_takes_no_memory(monkeypatch):
    model = t.LlamaForCausalLM(t.LlamaConfig(**TEXT))
    model.model.embed_tokens.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    structure, modules = str(model), list(model.modules())
    made = []
    own = LoraModel._create_and_replace

    def spy(self, config, name, target, target_name, parent, **kwargs):
        own(self, config, name, target, target_name, parent, **kwargs)
        made.extend(p for n, p in parent.named_parameters() if "lora_" in n)

    monkeypatch.setattr(LoraModel, "_create_and_replace", spy)
    assert refused(model, match_modules(model, "all-linear"), ()) == {}
    assert made and all(parameter.is_meta for parameter in made)
    assert str(model) == structure and list(model.modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(p.is_meta for p in model.parameters())


def test_a_linear_layer_that_peft_does_not_know_is_found_before_a_search():
    class Own(nn.Module):
        in_features = out_features = 16

        def forward(self, x):
            return x

    model = residual()
    model.blocks[1] = Own()
    reasons = refused(model, [f"blocks.{i}" for i in range(4)], ())
    assert list(reasons) == ["blocks.1"] and "not supported" in reasons["blocks.1"]


def test_layers_whose_weights_would_be_lost_at_a_load_are_found_before_a_search():
    """Laguna's renaming of old keys, shared_expert to shared_experts, damages current ones."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    model = t.LagunaForCausalLM(t.LagunaConfig(**{**TEXT, **sizes}))
    names = match_modules(model, "all-linear")
    shared = [name for name in names if ".shared_experts." in name]
    reasons = refused(model, names, ())
    assert shared and list(reasons) == shared
    assert all("would not be loaded again" in reason for reason in reasons.values())


@pytest.mark.parametrize("family", MOE)
def test_mixtures_of_experts_get_their_ranks_and_their_experts_none(family):
    """PEFT takes names that experts had before transformers 5 for the experts' parameters."""
    model = make_moe(family)
    names = match_modules(model, "all-linear")
    assert refused(model, names, ()) == {}
    ranks = {name: i % 3 for i, name in enumerate(names)}
    wanted = {name: rank for name, rank in ranks.items() if rank}
    adapted = add_lora(model, lora_config(wanted, (), 2.0, model), ranks, [])
    assert adapted_ranks(adapted) == wanted
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
