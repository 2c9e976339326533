"""MixedRankLinear: one frozen linear layer, its rank branches, its alpha; all arithmetic of the
mixture. Not here: how gates are sampled for a whole model (supernet.py, relaxation.py)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
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
        y = self.base_layer(x)
        x = self.dropout(x)
        h = F.linear(x, self.lora_A.to(x.dtype))
        h = h * _broadcast(gates, h).to(h.dtype)
        return y + F.linear(h, self.lora_B.to(h.dtype)).to(y.dtype)

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
