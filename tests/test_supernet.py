"""Supernet: layers and modules trained in full, gates once a forward, parameter groups, removal.
Not here: which modules match (test_targets.py), training it (test_architect.py, test_search.py)."""

import copy

import pytest
import torch
import transformers as t
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from families import TEXT
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from darts_lora import InputError, MixedRankLinear, SearchConfig, Supernet
from darts_lora.lora.targets import match_saved_modules
from small_models import randomise, residual


def config(**options):
    return SearchConfig(**{"ranks": (0, 1, 2, 4), **options})


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return t.LlamaForCausalLM(t.LlamaConfig(vocab_size=32, num_attention_heads=2, **sizes))


def bert():
    torch.manual_seed(0)
    sizes = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return t.BertForSequenceClassification(t.BertConfig(**sizes, num_labels=3)).eval()


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


@pytest.mark.parametrize("own", [False, True])
def test_removal_takes_away_what_accelerate_put_into_the_model(own):
    AcceleratorState._reset_state(reset_partial_state=True)
    model = residual()
    if own:
        model.forward = lambda x: x.sum()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    before = dict(vars(model))
    supernet = Supernet(model, config())
    accelerator.prepare(model)
    assert vars(model)["forward"] is not before.get("forward")
    supernet.remove()
    assert vars(model).keys() == before.keys()
    assert vars(model).get("forward") is before.get("forward")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_parameter_groups_are_disjoint_and_all_else_is_frozen():
    supernet = Supernet(residual(), config())
    weights, alphas = supernet.weight_parameters(), [supernet.alpha]
    ids = {id(p) for p in (*weights, *alphas)}
    assert len(ids) == len(weights) + len(alphas) == 2 * len(supernet.layers) + 1
    trained = [p for p in supernet.model.parameters() if p.requires_grad]
    assert [id(p) for p in trained] == [id(p) for p in weights]  # alpha is outside the model


def test_a_plain_backward_trains_weights_only():
    supernet = Supernet(residual(), config())
    randomise(supernet)
    supernet.model(torch.randn(3, 16)).sum().backward()
    assert all(p.grad is not None for p in supernet.weight_parameters())
    assert supernet.alpha.grad is None


def test_weights_train_the_mean_mixture_of_the_even_distribution():
    """Whatever alpha is: in each forward the same, in training and in evaluation."""
    supernet = Supernet(residual(), config(budget_rank=1.5))
    x = torch.ones(2, 16)
    probabilities = supernet.held.softmax(-1)
    ranks = torch.tensor([0.0, 1.0, 2.0, 4.0])
    torch.testing.assert_close(probabilities @ ranks, torch.full((4,), 1.5))
    assert torch.equal(supernet.alpha, supernet.held)
    wanted = torch.stack(
        [2.0 * layer.membership @ p
         for layer, p in zip(supernet.layers.values(), probabilities, strict=True)]
    )  # fmt: skip
    randomise(supernet)
    torch.testing.assert_close(supernet.mean_gates(), wanted)
    for training in (True, False):
        supernet.model.train(training)(x)
        for layer, gates in zip(supernet.layers.values(), wanted, strict=True):
            torch.testing.assert_close(layer.gates, gates)


def test_without_a_budget_it_is_half_of_the_largest_candidate():
    supernet = Supernet(residual(), config())
    assert supernet.budget == Supernet(residual(), config(budget_rank=2)).budget == 2 * 4 * 32
    assert float(supernet.expected_parameters()) == pytest.approx(supernet.budget)


def test_each_row_has_the_gates_that_are_probed():
    supernet = Supernet(residual(), config())
    randomise(supernet)
    x, gates = torch.randn(8, 16), torch.rand(4, 8, 8)
    with supernet.probing(lambda rows: gates[:, :rows]):
        together = supernet.model(x)
    for row in range(8):
        with supernet.probing(lambda rows, row=row: gates[:, row]):
            alone = supernet.model(x[row : row + 1])
        assert torch.allclose(alone, together[row : row + 1], atol=1e-5)
    assert not torch.allclose(supernet.model(x), together, atol=1e-2)


def test_gates_are_probed_once_for_each_number_of_rows():
    supernet, asked = Supernet(residual(), config()), []

    def gates(rows):
        asked.append(rows)
        return torch.rand(4, rows, 8)

    with supernet.probing(gates):
        for rows in (3, 5, 3, 5, 3):
            supernet.model(torch.randn(rows, 16))
    assert asked == [3, 5]
    supernet.model(torch.randn(3, 16))
    assert asked == [3, 5] and supernet.calls == 6


@pytest.mark.parametrize("budget_rank", [0.7, 2])
def test_in_its_directions_the_model_is_the_same(budget_rank):
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 3))  # the last is narrow
    supernet = Supernet(model, config(budget_rank=budget_rank))
    supernet.model.double()
    supernet._place_alpha(supernet.alpha.device, torch.float64)
    randomise(supernet)
    x = torch.randn(5, 16, dtype=torch.float64)
    mean, weights = model(x), supernet.weight_parameters()
    before = [w.detach().clone() for w in weights]
    with pytest.raises(ZeroDivisionError), supernet.in_directions():
        whole = torch.full_like(supernet.mean_gates(), supernet.config.scaling)
        with supernet.probing(lambda rows: whole):
            assert (model(x) - mean).abs().max() < 1e-12
        for layer in supernet.layers.values():
            b = layer.lora_B.T @ layer.lora_B
            a = layer.lora_A @ layer.lora_A.T
            for gram in (a, b):
                assert (gram - gram.diagonal().diag()).abs().max() < 1e-12, "at right angles"
            sizes = (a.diagonal() * b.diagonal()).sqrt()
            assert (sizes.diff() <= 1e-12).all(), "the largest first"
        1 / 0  # noqa: B018
    assert all(map(torch.equal, weights, before)) and torch.equal(model(x), mean)


class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.inner, self.reentrant = residual(), reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def probed(supernet, loss):
    """Gradients of a gate for each layer and row, of five rows."""
    gates = supernet.mean_gates()
    places = torch.linspace(0.1, 0.9, 5).expand(len(gates), -1).clone().requires_grad_()
    with supernet.probing(lambda rows: places[..., None] * gates[:, None]):
        return torch.autograd.grad(loss(), places)[0]


@pytest.mark.parametrize("forwards", [1, 2])
def test_recomputation_sees_the_gates_of_its_forward(forwards):
    """Also of a loss over several forwards, as those of preferences are."""
    gradients = []
    for wrap in (residual, Checkpointed):
        supernet = Supernet(wrap(), config())
        randomise(supernet)
        torch.manual_seed(3)
        inputs = torch.randn(forwards, 5, 16, requires_grad=True)

        def loss(supernet=supernet, inputs=inputs):
            return sum(supernet.model(x).pow(2).sum() for x in inputs)

        loss().backward()
        found = [p.grad for p in supernet.weight_parameters()]
        gradients.append([*found, probed(supernet, loss)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert gradients[0][-1].all()


class WithoutGradients(Checkpointed):
    def forward(self, x):
        with torch.no_grad():
            return self.inner(x)


@pytest.mark.parametrize("wrap", [lambda: Checkpointed(reentrant=True), WithoutGradients])
def test_layers_that_a_forward_runs_without_gradients_are_refused(wrap):
    """Re-entrant checkpointing trains weights, and gives alpha no gradient."""
    supernet = Supernet(wrap(), config())
    with pytest.raises(InputError, match=r"16 -> 16 runs without .* use_reentrant=False; "):
        supernet.model(torch.randn(5, 16, requires_grad=True))
    with torch.no_grad():
        assert supernet.model(torch.randn(5, 16)).shape == (5, 16)


class Refined(Checkpointed):
    """Runs its layers twice, the last time alone with gradients, as recurrent models do."""

    def forward(self, x):
        with torch.no_grad():
            x = self.inner(x)
        return self.inner(x)


def test_layers_that_have_gradients_in_one_of_several_calls_are_searched():
    supernet = Supernet(Refined(), config())
    randomise(supernet)
    assert probed(supernet, lambda: supernet.model(torch.randn(5, 16)).sum()).all()


def test_probabilities_and_expected_parameters():
    supernet = Supernet(residual(), config())
    randomise(supernet)
    p = supernet.probabilities().detach()
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
    assert isinstance(layer, MixedRankLinear)
    randomise(supernet)
    gates = torch.rand(1, 4, 8)
    with supernet.probing(lambda rows: gates[:, :rows]):
        tiles = supernet.model(pixel_values=patches, input_ids=ids)
        assert layer.gates.shape[0] == 4, "three patches a row"
        packed = supernet.model(pixel_values=patches[:10], input_ids=ids)
    for rows, found in ((gates[0].repeat_interleave(3, 0), tiles), (gates[0, :1], packed)):
        x = patches[: len(found)]
        wanted = layer.base_layer(x) + (x @ layer.lora_A.T * rows) @ layer.lora_B.T
        torch.testing.assert_close(found, wanted)


def test_a_classifiers_head_is_trained_in_a_copy_and_the_original_comes_back():
    model, ids = bert(), torch.randint(0, 64, (4, 7))
    head, before, structure = model.classifier, model(ids).logits, str(model)
    values = copy.deepcopy(model.state_dict())
    head.bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    supernet = Supernet(model, config(budget_rank=1))
    (copied,) = supernet.saved_modules.values()
    assert model.classifier is copied and copied is not head
    assert "classifier" not in supernet.layers and "bert.pooler.dense" in supernet.layers
    assert torch.equal(model(ids).logits, before)
    shapes = [(layer.in_features, layer.out_features) for layer in supernet.layers.values()]
    assert supernet.budget == sum(sum(shape) for shape in shapes), "the head is not counted"

    weights = supernet.weight_parameters()
    assert {id(p) for p in copied.parameters()} < {id(p) for p in weights}
    assert len(weights) == len({id(p) for p in weights}) == 2 * len(supernet.layers) + 2
    trained = {id(p) for p in (*weights, supernet.alpha)}
    assert all(p.requires_grad == (id(p) in trained) for p in model.parameters())
    randomise(supernet)
    optimizer = torch.optim.SGD(weights, lr=0.1)
    model(ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    for part in ("weight", "bias"):
        assert not torch.equal(getattr(copied, part), getattr(head, part))

    assert supernet.remove() is model and model.classifier is head
    assert str(model) == structure and torch.equal(model(ids).logits, before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(torch.equal(v, values[n]) for n, v in model.state_dict().items())
    assert not torch.equal(supernet.saved_modules["classifier"].weight, head.weight)


def test_a_head_in_float16_is_not_trained():
    with pytest.raises(InputError, match=r"modules_to_save: classifier is in float16, .* bfloat16"):
        Supernet(bert().half(), config(budget_rank=1))
    Supernet(bert().bfloat16(), config(budget_rank=1))


def test_named_modules_are_trained_in_full_and_not_searched():
    supernet = Supernet(bert(), config(modules_to_save=["LayerNorm", "pooler"]))
    saved = list(supernet.saved_modules)
    assert saved == match_saved_modules(bert(), ["LayerNorm", "pooler"])
    assert "bert.pooler" in saved and "classifier" in saved and len(saved) == 7
    assert not [name for name in supernet.layers if name.startswith("bert.pooler")]
    randomise(supernet)
    supernet.model(torch.randint(0, 64, (4, 7))).logits.pow(2).sum().backward()
    for name, module in supernet.saved_modules.items():
        assert all(p.grad.abs().max() > 0 for p in module.parameters()), name
    model = t.LlamaForCausalLM(t.LlamaConfig(**{**TEXT, "tie_word_embeddings": True}))
    supernet = Supernet(model, config(modules_to_save=["lm_head"]))
    assert supernet.saved_modules["lm_head"].weight is not model.model.embed_tokens.weight
    supernet.remove()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_state_holds_the_modules_trained_in_full():
    one, other = Supernet(bert(), config()), Supernet(bert(), config(seed=1))
    randomise(one)
    nn.init.normal_(one.saved_modules["classifier"].weight)
    state = one.state_dict()
    assert torch.equal(state["classifier.weight"], one.saved_modules["classifier"].weight)
    assert len(state) == 4 * len(one.layers) + 2
    other.load_state_dict(state)
    ids = torch.randint(0, 64, (4, 7))
    assert torch.equal(one.model(ids).logits, other.model(ids).logits)
    del state["classifier.bias"]
    with pytest.raises(InputError, match="names or shapes"):
        other.load_state_dict(state)


def test_a_probed_loss_wants_no_gradients_of_the_weights():
    supernet = Supernet(residual(), config())
    randomise(supernet)
    weights = supernet.weight_parameters()
    gates = torch.rand(4, 8, requires_grad=True)

    def found():
        loss = supernet.model(torch.randn(3, 16)).square().sum()
        return torch.autograd.grad(loss, [gates, *weights], allow_unused=True)

    with supernet.probing(lambda rows: gates):
        own, *others = found()
    assert own.any() and others == [None] * len(weights)
    own, *others = found()
    assert own is None and None not in others
