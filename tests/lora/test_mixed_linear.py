"""MixedRankLinear against the explicit sum over branches, gradcheck and PEFT's own LoRA layer.
Not here: gates of whole models (test_supernet.py)."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from darts_lora import InputError, MixedRankLinear
from darts_lora.lora.mixed_linear import linear_shape
from small_models import branch_weights

RANKS = (0, 1, 2, 4)


def make(ranks=RANKS, scaling=2.0, seed=0, base=None):
    torch.manual_seed(seed)
    base = nn.Linear(6, 5) if base is None else base
    layer = MixedRankLinear(base, ranks, scaling=scaling).double()
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.alpha)
    return layer


def explicit(layer, x, weights):
    """base(x) + s * sum_k weights_k * B_k A_k x, branch by branch; weights (K,) or (rows, K)."""
    y = layer.base_layer(x)
    for k, rank in enumerate(layer.ranks):
        a, b = branch_weights(layer, rank)
        weight = weights[..., k]
        weight = weight.reshape(-1, *[1] * (x.dim() - 1)) if weight.dim() else weight
        y = y + layer.scaling * weight * (x @ a.T @ b.T)
    return y


def test_equals_the_explicit_sum_over_branches():
    layer, x = make(), torch.randn(3, 7, 6, dtype=torch.float64)
    expected = explicit(layer, x, layer.probabilities())
    assert (layer(x) - expected).abs().max() < 1e-12


def test_columns_are_aligned_and_those_of_no_branch_stay_zero():
    layer = MixedRankLinear(nn.Linear(16, 16), [0, 3, 11])
    used = 11
    assert len(layer.lora_A) == layer.lora_B.shape[1] == 16
    assert layer.lora_A[:used].ne(0).all() and layer.membership[:used].sum(1).ge(1).all()
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1)
    for _ in range(3):
        layer(torch.randn(5, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert layer.lora_B[:, :used].ne(0).all()
    assert not layer.lora_A[used:].any() and not layer.lora_B[:, used:].any()
    assert not layer.membership[used:].any()


def test_gates_of_each_row_equal_the_explicit_sum():
    layer, x = make(), torch.randn(4, 7, 6, dtype=torch.float64)
    weights = torch.rand(4, len(RANKS), dtype=torch.float64)
    layer.gates = layer.scaling * weights @ layer.membership.T
    assert (layer(x) - explicit(layer, x, weights)).abs().max() < 1e-12
    tiles = x.repeat_interleave(3, dim=0)  # three image tiles a row
    assert (layer(tiles) - layer(x).repeat_interleave(3, dim=0)).abs().max() < 1e-12
    packed = x[:3]  # leading size is no multiple of the rows: the first row's sample serves all
    assert (layer(packed) - explicit(layer, packed, weights[0])).abs().max() < 1e-12


def test_gradients_of_input_weights_and_alpha():
    layer = make()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    parameters = (layer.lora_A, layer.lora_B, layer.alpha)
    names = ("lora_A", "lora_B", "alpha")

    def forward(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *parameters))


@pytest.mark.parametrize("rank", RANKS)
def test_one_hot_alpha_equals_peft(rank):
    layer, x = make(), torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.alpha.fill_(-torch.inf)
        layer.alpha[RANKS.index(rank)] = 0
    reference = nn.Sequential(layer.base_layer)
    if rank > 0:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"])
        reference = inject_adapter_in_model(config, reference).double()
        a, b = branch_weights(layer, rank)
        reference[0].lora_A["default"].weight.data.copy_(a)
        reference[0].lora_B["default"].weight.data.copy_(b)
    assert (layer(x) - reference(x)).abs().max() < 1e-12


def test_starts_as_the_base_layer_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        base, x = nn.Linear(6, 5, dtype=dtype), torch.randn(3, 6, dtype=dtype)
        expected = base(x)
        layer = MixedRankLinear(base, RANKS)
        assert torch.equal(layer(x), expected)
        assert layer(x).dtype == dtype
        assert layer.lora_A.dtype == layer.alpha.dtype == torch.float32
        assert torch.equal(layer.alpha, torch.zeros(len(RANKS)))
        assert not any(p.requires_grad for p in base.parameters())


def test_columns_of_a_candidate():
    layer = make()
    assert torch.allclose(layer.probabilities(), layer.alpha.softmax(0))
    a, b = branch_weights(layer, 2)  # rank 1 is its first column
    assert torch.equal(a, layer.lora_A[:2]) and torch.equal(b, layer.lora_B[:, :2])


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        ([], {}, r"ranks=\[\]"),
        ([1, 1], {}, r"ranks=\[1, 1\]"),
        ([-1, 2], {}, r"ranks=\[-1, 2\]"),
        ([1.5], {}, r"ranks=\[1.5\]"),
        ([True], {}, r"ranks=\[True\]"),
        ([0], {}, r"ranks=\[0\]"),
        ([8], {}, "rank 8 is above 5"),
        ([1], {"dropout": 1.0}, "dropout=1.0"),
        ([1], {"scaling": 0.0}, "scaling=0.0"),
    ],
)
def test_bad_input(ranks, options, message):
    with pytest.raises(InputError, match=message):
        MixedRankLinear(nn.Linear(6, 5), ranks, **options)


def test_over_a_conv1d():
    """GPT-2's linear layer, whose weight is (in, out)."""
    base = Conv1D(5, 6)
    layer, x = make(base=base), torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    assert (layer.in_features, layer.out_features) == (6, 5)
    linear = nn.Linear(6, 5).double()
    linear.weight.data, linear.bias.data = base.weight.data.T, base.bias.data + 0.5
    base.bias.data += 0.5
    same = make(base=linear)
    assert torch.equal(same.lora_A, layer.lora_A) and torch.equal(same.alpha, layer.alpha)
    assert (layer(x) - same(x)).abs().max() < 1e-12
    assert (layer(x) - explicit(layer, x, layer.probabilities())).abs().max() < 1e-12
    layer(x).pow(2).sum().backward()
    for value in (x, layer.lora_A, layer.lora_B, layer.alpha):
        assert value.grad.isfinite().all() and value.grad.abs().max() > 0
    assert base.weight.grad is None


@pytest.mark.parametrize("shape", [(6,), (1, 6), (0, 6), (0, 3, 6), (2, 0, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("per_row", [False, True])
def test_inputs_of_any_leading_shape(shape, per_row):
    """One row without a batch, and none, as experts without a token see it."""
    layer, x = make(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = layer.probabilities()
    if per_row:
        weights = torch.rand(2, len(RANKS), dtype=torch.float64, requires_grad=True)
        layer.gates = layer.scaling * weights @ layer.membership.T
        if shape[0] != 2:
            weights = weights[0] if shape[0] else weights[:0]
    leaves = (x, layer.lora_A, layer.lora_B)
    expected, found = explicit(layer, x, weights), layer(x)
    assert found.shape == (*shape[:-1], 5) and torch.allclose(found, expected, atol=1e-12)
    found, expected = (torch.autograd.grad(y.pow(2).sum(), leaves) for y in (found, expected))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("base_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_branches_in_bfloat16(base_dtype):
    """Float64 activations hold bfloat16 weights exactly; narrower ones as well as they can."""
    base = nn.Linear(6, 5, dtype=base_dtype)
    layer = MixedRankLinear(base, RANKS, dtype=torch.bfloat16)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16
    assert layer.alpha.dtype == torch.float32
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.alpha)
    x = torch.randn(3, 7, 6, dtype=base_dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    parameters = (layer.lora_A, layer.lora_B, layer.alpha)
    for value in (x, *parameters):
        assert value.grad.dtype == value.dtype and value.grad.abs().max() > 0
    assert y.dtype == base_dtype
    gradients = [p.grad.double() for p in parameters]
    exact = layer.double()
    expected = explicit(exact, x.detach().double(), exact.probabilities())
    exact.zero_grad()
    expected.sum().backward()
    close = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.05}[base_dtype]
    assert (y.double() - expected).norm() < close * expected.norm()
    for value, gradient in zip(parameters, gradients, strict=True):
        rounded = max(close, 0.01)  # a gradient is as wide as its parameter
        assert (gradient - value.grad).norm() < rounded * value.grad.norm()


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(6, 5), (6, 5)),
        (Conv1D(5, 6), (6, 5)),
        (MixedRankLinear(nn.Linear(6, 5), RANKS), (6, 5)),
        (nn.Embedding(6, 5), None),
        (nn.LayerNorm(6), None),
        (nn.Conv2d(6, 5, 1), None),
        (nn.Bilinear(6, 5, 4), None),
        (nn.Sequential(nn.Linear(6, 5)), None),
    ],
)
def test_shape_of_linear_layers_alone(module, shape):
    assert linear_shape(module) == shape
    if shape is None:
        with pytest.raises(InputError, match=f"a {type(module).__name__} is not a linear layer"):
            MixedRankLinear(module, RANKS)


def test_any_linear_like_base():
    class Opaque(nn.Module):
        in_features, out_features = 6, 5

        def forward(self, x):
            return x[..., :5] * 2

    layer, x = MixedRankLinear(Opaque(), RANKS), torch.randn(3, 6)
    assert torch.equal(layer(x), x[..., :5] * 2)


class Wrapped(nn.Linear):
    """Not a plain Linear for the layer, which must call it."""


def by_hook(base):
    base.register_forward_hook(lambda module, args, y: y)
    return base


def by_class(base):
    base.__class__ = Wrapped
    return base


@pytest.mark.parametrize("opaque", [by_class, by_hook])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", ["float64", "bfloat16", "autocast"])
def test_a_plain_base_is_computed_as_an_opaque_one(opaque, bias, mode):
    """The base's product is part of the layer's own node where it can be."""
    dtype = torch.float64 if mode == "float64" else torch.bfloat16
    x = torch.randn(4, 3, 6, dtype=torch.float32 if mode == "autocast" else dtype)
    results, calls = [], []
    for make_base in (lambda base: base, opaque):
        torch.manual_seed(0)
        layer = MixedRankLinear(make_base(nn.Linear(6, 5, bias=bias, dtype=dtype)), RANKS)
        layer = layer.double() if mode == "float64" else layer
        nn.init.normal_(layer.lora_B)
        layer.gates = torch.rand(2, 8, requires_grad=True)
        leaf = x.clone().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            y = layer(leaf)
        node = y.grad_fn.next_functions[0][0]  # behind the view
        calls.append(node.next_functions[4][0] is not None)  # y has a node of its own
        y.pow(2).sum().backward()
        results.append([y, leaf.grad, layer.lora_A.grad, layer.lora_B.grad, layer.gates.grad])
    assert calls == [False, True]
    for own, other in zip(*results, strict=True):
        assert own.dtype == other.dtype and own.shape == other.shape
        error = (own - other).norm() / other.norm()
        assert error < (1e-12 if mode == "float64" else 0.01)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (6,)])
def test_what_follows_may_work_in_place(shape, dropout):
    """As in PEFT; the gradients are those of a step that copies."""
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layer = MixedRankLinear(nn.Linear(6, 5), RANKS, dropout=dropout)
        nn.init.normal_(layer.lora_B)
        x = torch.randn(shape, requires_grad=True)
        y = layer(x).mul_(2) if inplace else layer(x) * 2
        y = nn.functional.relu(y, inplace=inplace)
        y.square().sum().backward()
        gradients.append([x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.alpha.grad])
    for copied, in_place in zip(*gradients, strict=True):
        assert torch.equal(copied, in_place)


def test_gradients_of_gradients_are_refused():
    layer = make()
    loss = layer(torch.randn(3, 6, dtype=torch.float64)).pow(2).sum()
    with pytest.raises(RuntimeError, match="gradients of gradients are not implemented"):
        torch.autograd.grad(loss, layer.lora_A, create_graph=True)


class Scaled(nn.Linear):
    def forward(self, x, scale=1.0, *, shift=0.0, pair=False):
        y = super().forward(x) * scale + shift
        return (y, None) if pair else y


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((0.5,), {}), ((), {"shift": 1.0})])
def test_further_arguments_reach_the_base_layer(args, kwargs, dropout):
    base, x = Scaled(6, 5), torch.randn(3, 6)
    layer = MixedRankLinear(base, RANKS, dropout=dropout).eval()
    assert torch.equal(layer(x, *args, **kwargs), base(x, *args, **kwargs))
    with pytest.raises(InputError, match=r"6 -> 5 \(Scaled\) gives a tuple, no tensor"):
        layer(x, pair=True)
    with pytest.raises(TypeError, match="unexpected keyword"):
        MixedRankLinear(nn.Linear(6, 5), RANKS)(x, scale=2.0)
