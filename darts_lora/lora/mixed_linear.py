"""MixedRankLinear: one frozen linear layer, its rank branches, its alpha; all arithmetic of the
mixture. Not here: which gates a whole model has (supernet.py, relaxation.py)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from darts_lora.base.errors import InputError
from darts_lora.lora.branches import RankBranches


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear-like module, None for any other module.

    transformers' Conv1D, the linear layer of GPT-2, calls them nx and nf.
    """
    for names in (("in_features", "out_features"), ("nx", "nf")):
        shape = [getattr(module, name, None) for name in names]
        if all(hasattr(size, "__index__") for size in shape):
            inside, outside = map(int, shape)
            return inside, outside
    return None


class MixedRankLinear(RankBranches):
    """A frozen linear layer plus K low-rank branches, mixed by gates, in two matrix products:

        y = W x + B diag(g) A x,    g = s * M p

    with A (R, in), B (out, R), branch probabilities (or a one-hot sample) p (K,) and the 0/1
    membership M (R, K): rank r is the first r columns. R is the largest rank's next multiple of 8:
    the columns beyond belong to no branch and stay zero, but aligned products of 16-bit numbers are
    faster.

    Args:
        base_layer: any linear-like module (see linear_shape), quantized or not; it is frozen, and
            nothing but its call and its device is used.
        ranks, scaling: of RankBranches.
        dropout: dropout probability of the branches' input.
        dtype: of A and B. They are used in the dtype of the activations, which are never copied.

    Attributes:
        lora_A, lora_B: parameters (R, in) and (out, R), of `dtype`.

    Raises:
        InputError: unusable ranks, dropout or scaling; no rank above 0 fits the layer. In
            a forward: the base layer gives no tensor; the forward has gradients, but the layer is
            called without, so that it cannot learn.

    Source: the relaxation is DARTS (arXiv 1806.09055, eq. 2) over the ranks of LoRA (2106.09685).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        ranks: list[int] | tuple[int, ...],
        *,
        scaling: float = 2.0,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        shape = linear_shape(base_layer)
        if shape is None:
            raise InputError(f"base_layer: a {type(base_layer).__name__} is not a linear layer")
        self.in_features, self.out_features = shape
        if not 0 <= dropout < 1:
            raise InputError(f"dropout={dropout!r}: must be in [0, 1)")
        self.base_layer = base_layer.requires_grad_(False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

        device = next((t.device for t in base_layer.parameters()), None)
        self._set_branches(shape, ranks, scaling, device)
        a = torch.zeros(len(self.membership), self.in_features, device=device)
        nn.init.kaiming_uniform_(a[: self.used], a=math.sqrt(5))  # as PEFT; the same for any R
        self.lora_A = nn.Parameter(a.to(dtype))
        b = torch.zeros(self.out_features, len(self.membership), device=device, dtype=dtype)
        self.lora_B = nn.Parameter(b)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of the base layer's output; further arguments
        are the base layer's.

        With gates of one row per example, the leading dimension of x is a multiple of the rows
        (image tiles: each row's gates are repeated); where it is not (packed sequences), the first
        row's gates serve all of x.
        """
        gates = self.gates
        self.note_call()
        if gates is None:
            gates = self.scaling * (self.membership @ self.probabilities())
        if gates.dim() == 1:
            gates = gates[None]
        elif x.dim() == 1 or x.shape[0] % gates.shape[0]:
            gates = gates[:1]
        parameters, modules = self._parameters, self._modules  # getattr of a module is slow
        a: Any = parameters["lora_A"]
        b: Any = parameters["lora_B"]
        if not self.trains_weights:
            a, b = a.detach(), b.detach()
        base, dropout, dtype = modules["base_layer"], modules["dropout"], _compute_dtype(x)
        own = args or kwargs  # of a base layer whose call takes more
        if not own and type(dropout) is nn.Identity and (plain := _plain_weights(base, dtype)):
            out = _Mixture.apply(x, a, b, gates, None, *plain, dtype)
        else:
            x, y = dropout(x), base(x, *args, **kwargs)
            if not isinstance(y, Tensor):
                raise InputError(
                    f"a layer {self.in_features} -> {self.out_features} ({type(base).__name__}) "
                    f"gives a {type(y).__name__}, no tensor that a LoRA could be added to; name it "
                    "in exclude_modules"
                )
            out = _Mixture.apply(x, a, b, gates, y, None, None, dtype)
        return out.view(*x.shape[:-1], out.shape[1])

    @property
    def weight(self) -> Any:
        """The base layer's weight: some models ask a linear layer for its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base_layer, "bias", None)


class _Mixture(torch.autograd.Function):
    """y + ((x A^T) * g) B^T in `dtype`, as one node of autograd: nothing is computed or kept for
    gradients that the step does not want, and all sums are part of products.

    x (..., in); A (R, in); B (out, R); g (rows, R), whose rows divide the leading sizes of x; y
    (..., out), or None: then y is x W^T + bias, W (out, in), and is part of the node.

    A model calls this hundreds of times a step: every call below costs as much as a small kernel.
    """

    @staticmethod
    def forward(ctx, x, a, b, gates, y, weight, bias, dtype):
        flat = _cast(x.reshape(-1, x.shape[-1]), dtype)
        a_used, b_used = _cast(a, dtype), _cast(b, dtype)
        _, wants_a, wants_b, wants_gates = ctx.needs_input_grad[:4]
        h = nn.functional.linear(flat, a_used)
        gated = _gate(h, gates, torch.empty_like(h) if wants_gates else h)
        if weight is not None:
            out = nn.functional.linear(flat, weight, bias).addmm_(gated, b_used.t())
        elif y.dtype == dtype:
            out = torch.addmm(y.reshape(-1, y.shape[-1]), gated, b_used.t())
        else:
            out = y.reshape(-1, y.shape[-1]) + torch.mm(gated, b_used.t()).to(y.dtype)
        ctx.save_for_backward(
            flat if wants_a else None, a_used, b_used, gates, weight,
            h if wants_gates else None, gated if wants_b else None,
        )  # fmt: skip
        ctx.x_shape, ctx.dtypes = x.shape, (x.dtype, a.dtype, b.dtype)
        ctx.set_materialize_grads(False)
        return out  # (tokens, out): a view made in here could not be changed in place behind it

    @staticmethod
    def backward(ctx, out):
        if torch.is_grad_enabled():
            raise RuntimeError("MixedRankLinear: gradients of gradients are not implemented")
        if out is None:  # under DDP, of a layer that the loss does not depend on: no zeros
            return (None,) * 8
        flat, a, b, gates, weight, h, gated = ctx.saved_tensors
        wants_x, wants_a, wants_b, wants_gates, wants_y = ctx.needs_input_grad[:5]
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        rows = _cast(out, b.dtype)
        g_x = g_a = g_b = g_gates = None
        if wants_b:
            g_b = _product(rows.t(), gated, b_dtype)
        g_h = torch.mm(rows, b)
        if wants_gates:
            g_gates = _gate_gradient(g_h, h, gates)
        if wants_x or wants_a:
            _gate(g_h, gates, g_h)
        if wants_a:
            g_a = _product(g_h.t(), flat, a_dtype)
        if wants_x:
            g_x = torch.mm(g_h, a) if weight is None else torch.mm(rows, weight).addmm_(g_h, a)
            g_x = _cast(g_x, x_dtype).view(*ctx.x_shape)
        g_y = out.view(*ctx.x_shape[:-1], out.shape[1]) if wants_y else None
        return g_x, g_a, g_b, g_gates, g_y, None, None, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with x is computed in: autocast's, or that of x."""
    if x.is_cuda and not torch.is_autocast_enabled("cuda"):  # the usual case, cheaply
        return x.dtype
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _plain_weights(base: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias), if calling `base` is x W^T + bias and nothing else: no quantization, no
    hook."""
    if type(base) is not nn.Linear or "forward" in base.__dict__:
        return None
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    plain = (
        type(weight) in (nn.Parameter, Tensor)
        and weight.dtype == dtype
        and not (base._forward_hooks or base._forward_pre_hooks)
        and not (base._backward_hooks or base._backward_pre_hooks)
    )
    return (weight, bias) if plain else None


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _gate(h: Tensor, gates: Tensor, out: Tensor) -> Tensor:
    """h * gates, computed in the wider dtype of both, written to `out`, which may be h."""
    if gates.shape[0] > 1:
        torch.mul(_groups(h, gates), gates[:, None], out=_groups(out, gates))
        return out
    return h.mul_(gates) if out is h else torch.mul(h, gates, out=out)


def _gate_gradient(g_h: Tensor, h: Tensor, gates: Tensor) -> Tensor:
    """Gradient of the gates, (rows, R): the sums over each row's tokens of g_h * h."""
    if gates.shape[0] == 1:  # a small batch is bound by launches: this is one
        return _product(g_h.t(), h, gates.dtype).diagonal()[None]
    return _groups(g_h * h, gates).sum(1, dtype=gates.dtype)


def _groups(h: Tensor, gates: Tensor) -> Tensor:
    """h (tokens, R) as (rows of gates, tokens of each, R): image tiles share their row's gates."""
    rows = gates.shape[0]
    return h.view(rows, h.shape[0] // rows, h.shape[1])


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`: on a GPU straight from the sums, which are float32 there."""
    if a.is_cuda and dtype == torch.float32 != a.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return _cast(torch.mm(a, b), dtype)
