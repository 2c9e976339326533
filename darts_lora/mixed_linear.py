"""MixedRankLinear: one frozen linear layer, its rank branches, its alpha; all arithmetic of the
mixture. Not here: how gates are sampled for a whole model (supernet.py, relaxation.py)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from darts_lora.config import check_ranks
from darts_lora.errors import InputError


def branch_columns(ranks: tuple[int, ...], rank: int, branches: str) -> slice:
    """The rows of A and columns of B that belong to candidate `rank`.

    Raises:
        InputError: the rank is not a candidate.
    """
    if rank not in ranks:
        raise InputError(f"rank={rank!r}: must be one of the candidates {list(ranks)}")
    start = sum(r for r in ranks if r < rank) if branches == "independent" else 0
    return slice(start, start + rank)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear-like module, None for any other module.

    transformers' Conv1D, the linear layer of GPT-2, calls them nx and nf.
    """
    for names in (("in_features", "out_features"), ("nx", "nf")):
        shape = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in shape):
            return shape
    return None


class MixedRankLinear(nn.Module):
    """A frozen linear layer plus K low-rank branches, mixed by gates, in two matrix products:

        y = W x + B diag(g) A x,    g = s * M p

    with A (R, in), B (out, R), branch probabilities (or a one-hot sample) p (K,) and the 0/1
    membership M (R, K): independent branches have R = sum(ranks) columns of their own, nested
    branches have R = max(ranks) and rank r is the first r columns.

    Args:
        base_layer: any linear-like module (see linear_shape), quantized or not; it is frozen, and
            nothing but its call and its device is used.
        ranks: K candidate ranks, distinct integers >= 0; 0 means no adapter.
        scaling: s, the same for all ranks, PEFT's lora_alpha / r.
        branches: "independent" or "nested".
        dropout: dropout probability of the branches' input.
        dtype: of A and B. They are used in the dtype of the activations, which are never copied.

    Attributes:
        lora_A, lora_B: parameters (R, in) and (out, R), of `dtype`.
        alpha: float32 parameter (K,), the architecture weights, zeros at the start.
        gates: g for the coming forwards, (R,) or one row per example (rows, R), set by a Supernet;
            None: softmax(alpha) decides.
        trains_weights: whether gradients of A and B are wanted of the coming forwards.

    Raises:
        InputError: unusable ranks, branches, dropout or scaling; a rank above min(in, out).

    Source: the relaxation is DARTS (arXiv 1806.09055, eq. 2) over the ranks of LoRA (2106.09685).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        ranks: list[int] | tuple[int, ...],
        *,
        scaling: float = 2.0,
        branches: Literal["independent", "nested"] = "independent",
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.ranks = check_ranks(ranks)
        shape = linear_shape(base_layer)
        if shape is None:
            raise InputError(f"base_layer: a {type(base_layer).__name__} is not a linear layer")
        self.in_features, self.out_features = shape
        smaller = min(self.in_features, self.out_features)
        if self.ranks[-1] > smaller:
            raise InputError(
                f"ranks={list(self.ranks)}: rank {self.ranks[-1]} is above {smaller}, the smaller "
                f"side of a layer {self.in_features} -> {self.out_features}"
            )
        if branches not in ("independent", "nested"):
            raise InputError(f"branches={branches!r}: must be independent or nested")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout={dropout!r}: must be in [0, 1)")
        if not scaling > 0:
            raise InputError(f"scaling={scaling!r}: must be above 0")
        self.scaling, self.branches = float(scaling), branches
        self.base_layer = base_layer.requires_grad_(False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

        device = next((t.device for t in base_layer.parameters()), None)
        columns = sum(self.ranks) if branches == "independent" else self.ranks[-1]
        self.lora_A = nn.Parameter(torch.empty(columns, self.in_features, device=device))
        b = torch.zeros(self.out_features, columns, device=device, dtype=dtype)
        self.lora_B = nn.Parameter(b)
        self.alpha = nn.Parameter(torch.zeros(len(self.ranks), device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as PEFT; the same for any R
        self.lora_A.data = self.lora_A.data.to(dtype)
        membership = torch.zeros(columns, len(self.ranks), device=device)
        for k, rank in enumerate(self.ranks):
            membership[branch_columns(self.ranks, rank, branches), k] = 1
        self.register_buffer("membership", membership, persistent=False)
        self.gates: Tensor | None = None
        self.trains_weights = True

    def probabilities(self) -> Tensor:
        """softmax(alpha), (K,)."""
        return self.alpha.softmax(0)

    def branch_weights(self, rank: int) -> tuple[Tensor, Tensor]:
        """(A, B) of one candidate: views (rank, in) and (out, rank) of the shared weights."""
        columns = branch_columns(self.ranks, rank, self.branches)
        return self.lora_A[columns], self.lora_B[:, columns]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of the base layer's output.

        With gates of one row per example, the leading dimension of x is a multiple of the rows
        (image tiles: each row's gates are repeated); where it is not (packed sequences), the first
        row's gates serve all of x.
        """
        gates = self.gates
        if gates is None:
            gates = self.scaling * (self.membership @ self.probabilities())
        a, b = self.lora_A, self.lora_B
        if not self.trains_weights:
            a, b = a.detach(), b.detach()
        y, x = self.base_layer(x), self.dropout(x)
        return _Mixture.apply(y, x, a, b, _broadcast(gates, x))

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: some models ask a linear layer for its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base_layer, "bias", None)

    def extra_repr(self) -> str:
        return f"ranks={list(self.ranks)}, scaling={self.scaling}, branches={self.branches}"


class _Mixture(torch.autograd.Function):
    """y + ((x A^T) * g) B^T in the dtype of x, or autocast's, as one node of autograd: nothing is
    computed or kept for gradients that the step does not want, and the sum is part of a product.

    y (..., out); x (..., in); A (R, in); B (out, R); g broadcasts against (..., R).
    """

    @staticmethod
    def forward(ctx, y, x, a, b, gates):
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        with torch.autocast(device, enabled=False):
            flat, a_used, b_used = _rows(x).to(dtype), a.to(dtype), b.to(dtype)
            h = (flat @ a_used.T).view(*x.shape[:-1], len(a))
            gated = h * gates.to(dtype)
            gated_flat, y_flat = _rows(gated), _rows(y)
            if y.dtype == dtype:
                out = torch.addmm(y_flat, gated_flat, b_used.T)
            else:
                out = y_flat + (gated_flat @ b_used.T).to(y.dtype)
        _, _, wants_a, wants_b, wants_gates = ctx.needs_input_grad
        ctx.save_for_backward(
            flat if wants_a else None, a_used, b_used, gates,
            h if wants_gates else None, gated_flat if wants_b else None,
        )  # fmt: skip
        ctx.dtypes = x.dtype, a.dtype, b.dtype
        return out.view(y.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, out):
        flat, a, b, gates, h, gated = ctx.saved_tensors
        _, wants_x, wants_a, wants_b, wants_gates = ctx.needs_input_grad
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        out_flat = _rows(out).to(b.dtype)
        g_x = g_a = g_b = g_gates = None
        if wants_b:
            g_b = (out_flat.T @ gated).to(b_dtype)
        g_gated = (out_flat @ b).view(*out.shape[:-1], len(a))
        if wants_gates:
            g_gates = (g_gated * h).float() if gates.dtype == torch.float32 else g_gated * h
            g_gates = g_gates.sum_to_size(gates.shape)
        if wants_x or wants_a:
            g_h = _rows(g_gated * gates.to(b.dtype))
            g_a = (g_h.T @ flat).to(a_dtype) if wants_a else None
            g_x = (g_h @ a).to(x_dtype).view(*out.shape[:-1], a.shape[1]) if wants_x else None
        return out, g_x, g_a, g_b, g_gates


def _rows(x: Tensor) -> Tensor:
    """x (..., n) as (rows, n); a single row and no row at all too."""
    return x.reshape(-1, x.shape[-1])


def _broadcast(gates: Tensor, h: Tensor) -> Tensor:
    """Gates (R,) or (rows, R) in a shape that multiplies h (leading, ..., R)."""
    if gates.dim() == 1:
        return gates
    times, remainder = divmod(h.shape[0], gates.shape[0]) if h.dim() > 1 else (0, 1)
    if remainder:
        return gates[0]
    if times != 1:
        gates = gates.repeat_interleave(times, dim=0)
    return gates.view(-1, *[1] * (h.dim() - 2), gates.shape[-1])
