"""MixedRankExperts against explicit sums and PEFT's own; which parameters are experts.
Not here: linear layers beside experts (test_adapter.py), recipes (recipes/test_families.py)."""

import itertools
import json

import pytest
import torch
from families import MOE, make_moe
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from darts_lora import Architect, Genotype, InputError, SearchConfig, Supernet
from darts_lora.finetune import FinetuneConfig, add_adapter
from darts_lora.lora.adapter import adapted_ranks
from darts_lora.lora.experts import MixedRankExperts, expert_tensors, peft_names, stacked_tensors
from darts_lora.lora.targets import match_parameters
from small_models import branch_weights, randomise

RANKS = (0, 1, 2, 4)
TOKENS = torch.randint(15, 64, (3, 7), generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Expert e on the rows of x[e]."""

    def __init__(self, transposed: bool):
        super().__init__()
        shape = (3, 6, 5) if transposed else (3, 5, 6)
        self.is_transposed, self.up = transposed, nn.Parameter(torch.randn(shape))
        self.scale = nn.Parameter(torch.randn(3, 1, 5))

    def forward(self, x, *, factor=1.0):
        up = self.up if self.is_transposed else self.up.mT
        return x @ up * self.scale * factor


class Table(nn.Module):
    """Has a 3-D parameter that is no experts'."""


@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_explicit_sum_over_branches(transposed):
    experts, x = Experts(transposed).double(), torch.randn(3, 4, 6, dtype=torch.float64)
    layer = MixedRankExperts(experts, "up", RANKS).double()
    assert layer.shape == (3, 6, 5) and layer.ranks == RANKS
    assert torch.equal(layer(x, factor=2.0), experts(x, factor=2.0))  # B is 0 at the start
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.alpha)
    expected = experts(x, factor=2.0)
    for rank, weight in zip(RANKS, layer.probabilities(), strict=True):
        a, b = branch_weights(layer, rank)
        assert a.shape == (3, rank, 6) and b.shape == (3, 5, rank)
        for e in range(3):
            own = 2.0 * layer.scaling * weight * (x[e] @ a[e].T @ b[e].T) * experts.scale[e]
            expected = expected + torch.stack([own if i == e else 0 * own for i in range(3)])
    assert (layer(x, factor=2.0) - expected).abs().max() < 1e-12


def test_a_frozen_step_and_gates_of_rows():
    layer = MixedRankExperts(Experts(False), "up", RANKS)
    nn.init.normal_(layer.lora_B)
    x, layer.gates = torch.randn(3, 4, 6), torch.rand(2, 8, requires_grad=True)
    layer.trains_weights = False
    layer(x).sum().backward()
    assert layer.lora_A.grad is None and layer.lora_B.grad is None
    assert layer.gates.grad[0].any() and not layer.gates.grad[1].any()


class Alone(nn.Module):
    """Experts beside a linear layer that is not called."""

    def __init__(self):
        super().__init__()
        self.experts, self.proj = Experts(False), nn.Linear(8, 8)

    def forward(self, x):
        return self.experts(x)


def test_experts_that_a_forward_runs_without_gradients_are_refused():
    model, x = Alone(), torch.randn(3, 4, 6)
    options = {"target_modules": ["proj"], "target_parameters": ["up"]}
    randomise(Supernet(model, SearchConfig(ranks=RANKS, **options)))
    model(x).sum().backward()
    with torch.no_grad(), pytest.raises(InputError, match="6 -> 5 runs without gradients"):
        model.register_forward_pre_hook(lambda *_: (torch.set_grad_enabled(False), None)[1])
        with torch.enable_grad():
            model(x)


def test_which_parameters_are_experts():
    model = nn.ModuleDict({"experts": Experts(True), "conv": nn.Conv1d(3, 4, 5)})
    model["table"] = Table()
    model["table"].positions = nn.Parameter(torch.randn(2, 4, 6))
    counts = torch.zeros(3, 5, 6, dtype=torch.int8)
    model["experts"].counts = nn.Parameter(counts, requires_grad=False)
    assert list(stacked_tensors(model)) == ["experts.up", "experts.scale", "table.positions"]
    assert expert_tensors(model) == {"experts.up": (3, 6, 5), "experts.scale": (3, 1, 5)}
    with pytest.raises(InputError, match=r"'upp' matches no 3-D parameter; .* experts\.up"):
        match_parameters(model, ["upp"])
    with pytest.raises(InputError, match="the model has none"):
        match_parameters(nn.Sequential(nn.Linear(2, 2)), "all-experts")
    assert list(match_parameters(model, ["positions", "experts.up"])) == [
        "experts.up",
        "table.positions",
    ]
    assert list(match_parameters(model, "all-experts", exclude_modules=["up"])) == ["experts.scale"]
    assert match_parameters(model, "all-experts", exclude_modules=".*experts") == {}


def test_of_several_parameters_of_a_module_the_last_is_outermost():
    names = ["a.up", "q", "a.down", "b.up"]
    assert peft_names(names, {"a.up", "a.down", "b.up"}) == {
        "a.up": "a.base_layer", "q": "q", "a.down": "a", "b.up": "b",
    }  # fmt: skip


@pytest.mark.parametrize("family", MOE)
def test_the_search_reaches_experts_and_the_adapter_is_the_searched_one(family, tmp_path):
    model = make_moe(family)
    base = model(input_ids=TOKENS).logits.detach()
    config = SearchConfig(ranks=RANKS, budget_rank=2, target_parameters="all-experts")
    supernet = Supernet(model, config)
    experts = [n for n, x in supernet.layers.items() if isinstance(x, MixedRankExperts)]
    assert experts == list(expert_tensors(make_moe(family)))
    assert torch.equal(model(input_ids=TOKENS).logits, base)
    randomise(supernet)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for layer in supernet.layers.values():
        assert layer.lora_A.grad.any() and layer.lora_B.grad.any()
    architect = Architect(supernet, 1)
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    architect.step(lambda b: model(**b).loss, itertools.repeat(batch))
    assert architect.measured.gains.all() and architect.measured.energies.any(-1).all()
    # one choice for each layer, in the supernet and in PEFT's adapter of its weights
    chosen = [i % len(RANKS) for i in range(len(supernet.layers))]
    columns = torch.arange(supernet.mean_gates().shape[1])
    gates = torch.stack([supernet.config.scaling * (columns < RANKS[k]) for k in chosen])
    with torch.no_grad():
        supernet.alpha.copy_(100.0 * nn.functional.one_hot(torch.tensor(chosen), len(RANKS)))
    genotype = Genotype.from_supernet(supernet)
    assert list(genotype.ranks.values()) == [RANKS[k] for k in chosen]
    genotype.save(tmp_path / "genotype.json")
    assert Genotype.load(tmp_path / "genotype.json") == genotype
    state = {k: v.contiguous() for k, v in supernet.state_dict().items()}
    save_file(state, tmp_path / "supernet.safetensors")
    with torch.no_grad(), supernet.in_directions(), supernet.probing(lambda rows: gates):
        wanted = model(input_ids=TOKENS).logits
    assert (wanted - base).abs().max() > 0.1
    assert torch.equal(supernet.remove()(input_ids=TOKENS).logits, base)
    options = FinetuneConfig(genotype=str(tmp_path / "genotype.json"), init="inherit")
    adapted = add_adapter(model, options, genotype)
    assert adapted_ranks(adapted) == {n: r for n, r in genotype.ranks.items() if r}
    assert adapted.get_nb_trainable_parameters()[0] == genotype.num_parameters
    torch.testing.assert_close(adapted(input_ids=TOKENS).logits, wanted, atol=1e-4, rtol=1e-4)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(make_moe(family), tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=TOKENS).logits, wanted, atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_parameters"]


def test_the_budget_counts_every_expert():
    model = make_moe("mixtral")
    config = SearchConfig(
        ranks=(0, 4),
        budget_rank=4,
        target_modules=["q_proj"],
        target_parameters=["experts.down_proj"],
    )
    supernet = Supernet(model, config)
    assert supernet.parameters_per_rank == 2 * (16 + 16) + 2 * 4 * (24 + 16)
    assert supernet.budget == 4 * supernet.parameters_per_rank


def test_experts_are_not_padded():
    genotype = Genotype({"model.layers.0.mlp.experts.down_proj": 2})
    with pytest.raises(InputError, match=r"pad_to_max=true: .* is a parameter of experts"):
        add_adapter(make_moe("mixtral"), FinetuneConfig("x", pad_to_max=True), genotype)


def test_a_uniform_baseline_of_experts_without_a_search():
    config = FinetuneConfig(None, rank=3, target_parameters="all-experts")
    adapted = add_adapter(make_moe("gpt_oss"), config, None)
    ranks = adapted_ranks(adapted)
    assert set(ranks.values()) == {3} and sum(".experts." in name for name in ranks) == 4
