"""Supernet: targets as PEFT's, gates once a forward, parameter groups, removal.
Not here: training it (test_architect.py, test_search.py)."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from darts_lora import InputError, MixedRankLinear, SearchConfig, Supernet
from darts_lora.supernet import match_modules
from small_models import randomise, residual


def config(**options):
    return SearchConfig(**{"ranks": (0, 1, 2, 4), **options})


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_attention_heads=2, **sizes))


@pytest.mark.parametrize(
    ("targets", "excluded"),
    [
        ("all-linear", None),
        (["q_proj", "v_proj"], None),
        (["q_proj", "layers.1.mlp.up_proj"], ["layers.0.self_attn.q_proj"]),
        (r".*\.mlp\..*_proj", r".*down.*"),
        ("all-linear", ["o_proj"]),
    ],
)
def test_targets_are_those_of_peft(targets, excluded):
    names = match_modules(llama(), targets, excluded)
    peft = get_peft_model(llama(), LoraConfig(target_modules=targets, exclude_modules=excluded))
    assert names == [n for n, m in peft.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert list(Supernet(llama(), config(target_modules=targets, exclude_modules=excluded)).layers)


def test_nothing_matches_names_the_nearest():
    with pytest.raises(InputError, match=r"target_modules=\['q_prj'\].*nearest names: q_proj"):
        Supernet(llama(), config(target_modules=["q_prj"]))


def test_target_that_is_no_linear_layer():
    with pytest.raises(InputError, match=r"model\.norm is a LlamaRMSNorm, not a linear layer"):
        Supernet(llama(), config(target_modules=["q_proj", "model.norm"]))


def test_rank_above_a_layers_smaller_side_names_the_layer():
    with pytest.raises(InputError, match=r"rank 20 is above 16, .* of model\.layers\.0\."):
        Supernet(llama(), config(ranks=(1, 20)))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"budget_rank": 4.5}, r"budget_rank=4\.5: .*\(uniform rank 1 to 4\)"),
        ({"budget_rank": 0.5}, "budget_rank=0.5"),
        ({"budget_parameters": 10**9}, "budget_parameters=1000000000"),
    ],
)
def test_budget_outside_the_candidates(budget, message):
    with pytest.raises(InputError, match=message):
        Supernet(residual(), config(ranks=(1, 4), **budget))


def test_budget_rank_is_a_uniform_loras_parameters():
    supernet = Supernet(llama(), config(budget_rank=3))
    peft = get_peft_model(llama(), LoraConfig(r=3, target_modules="all-linear"))
    assert supernet.budget == peft.get_nb_trainable_parameters()[0]


def test_inserting_changes_no_output_and_removing_restores_the_model():
    model, x = residual(), torch.randn(3, 16)
    before, state, structure = model(x), copy.deepcopy(model.state_dict()), str(model)
    model.blocks[0].bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    supernet = Supernet(model, config())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model(x), before)
    randomise(supernet)
    assert not torch.equal(model(x), before)
    assert supernet.remove() is model
    assert torch.equal(model(x), before) and str(model) == structure
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_parameter_groups_are_disjoint_and_all_else_is_frozen():
    supernet = Supernet(residual(), config())
    weights, alphas = supernet.weight_parameters(), supernet.arch_parameters()
    ids = {id(p) for p in (*weights, *alphas)}
    assert len(ids) == len(weights) + len(alphas) == 3 * len(supernet.layers)
    for parameter in supernet.model.parameters():
        assert parameter.requires_grad == (id(parameter) in ids)


def test_a_plain_backward_trains_weights_only():
    supernet = Supernet(residual(), config())
    randomise(supernet)
    supernet.model(torch.randn(3, 16)).sum().backward()
    assert all(p.grad is not None for p in supernet.weight_parameters())
    assert all(p.grad is None for p in supernet.arch_parameters())
    with supernet.arch_gradients():
        supernet.model(torch.randn(3, 16)).sum().backward()
    assert all(p.grad is not None for p in supernet.arch_parameters())


@pytest.mark.parametrize("branches", ["independent", "nested"])
def test_each_row_has_its_own_architecture(branches):
    supernet = Supernet(residual(), config(branches=branches))
    randomise(supernet)
    x = torch.randn(8, 16)
    together = supernet.model(x)
    gates = [layer.gates for layer in supernet.layers.values()]
    assert all(g.shape[0] == 8 for g in gates)
    supernet._hook.remove()
    for row in range(8):
        for layer, layer_gates in zip(supernet.layers.values(), gates, strict=True):
            layer.gates = layer_gates[row]
        assert torch.allclose(supernet.model(x[row : row + 1]), together[row : row + 1], atol=1e-5)


def test_one_architecture_a_forward_and_a_new_one_each_time():
    supernet = Supernet(residual(), config(sampling="batch"))
    seen = set()
    for _ in range(20):
        supernet.model(torch.randn(3, 16))
        gates = torch.stack([layer.gates for layer in supernet.layers.values()])
        assert gates.shape == (4, 7) and set(gates.unique().tolist()) <= {0.0, 2.0}
        seen.add(tuple(gates.flatten().tolist()))
    assert len(seen) > 10


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = residual()

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_gates_stay_fixed_under_recomputation():
    gradients = []
    for wrap in (residual, Checkpointed):
        supernet = Supernet(wrap(), config())
        randomise(supernet)
        torch.manual_seed(3)
        x = torch.randn(5, 16)
        with supernet.arch_gradients():
            supernet.model(x).pow(2).sum().backward()
        parameters = (*supernet.weight_parameters(), *supernet.arch_parameters())
        gradients.append([p.grad for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_probabilities_and_expected_parameters():
    supernet = Supernet(residual(), config())
    randomise(supernet)
    p = supernet.probabilities()
    assert p.shape == (4, 4)
    expected = sum(
        float(prob * rank * 32) for row in p for prob, rank in zip(row, (0, 1, 2, 4), strict=True)
    )
    assert float(supernet.expected_parameters()) == pytest.approx(expected, rel=1e-6)


def test_state_round_trip():
    one, other = Supernet(residual(), config()), Supernet(residual(), config(seed=1))
    randomise(one)
    other.load_state_dict(one.state_dict())
    for a, b in zip(one.weight_parameters(), other.weight_parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="names or shapes"):
        other.load_state_dict(Supernet(residual(depth=3), config()).state_dict())


def test_rows_come_from_the_text_not_from_packed_images():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, pixel_values, input_ids):
            return self.linear(pixel_values)

    supernet = Supernet(Packed(), config())
    patches, ids = torch.randn(12, 8), torch.zeros(4, 7, dtype=torch.long)
    supernet.model(pixel_values=patches, input_ids=ids)
    (layer,) = supernet.layers.values()
    assert isinstance(layer, MixedRankLinear) and layer.gates.shape[0] == 4
