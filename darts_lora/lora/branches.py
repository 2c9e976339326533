"""RankBranches: the candidate ranks of one layer, as columns of its A and B, with alpha and gates.
Not here: what a layer computes with them (mixed_linear.py, experts.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from darts_lora.base.bounds import check_ranks
from darts_lora.base.errors import InputError
from darts_lora.lora.cost import usable_ranks

ALIGNMENT = 8  # columns: 16 bytes of bfloat16


def branch_columns(ranks: tuple[int, ...], rank: int, branches: str) -> slice:
    """The rows of A and columns of B that belong to `rank`, one of the candidates."""
    start = sum(r for r in ranks if r < rank) if branches == "independent" else 0
    return slice(start, start + rank)


class Draw:
    """The noise of one draw of a model's gates. `waits` says that a loss made with it still waits
    for its backward pass, as long as the loss itself is there: the layers' nodes hold the draw."""

    def __init__(self, noise: Tensor):
        self.noise, self.waits = noise, True


class Forward:
    """What the layers of a model share in its forward: the draw, if there is one, whether it is a
    forward with gradients, and of each layer whether a call of it had them."""

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """Before and behind a forward, however it ended; the loss's nodes keep the draw."""
        self.draw: Draw | None = None
        self.has_gradients = False
        self.learns: dict[RankBranches, bool] = {}

    def check(self) -> None:
        """Behind a forward that went through.

        Raises:
            InputError: it has gradients, and a layer none: reentrant checkpointing gives alpha
                none either.
        """
        idle = [layer for layer, learns in self.learns.items() if not learns]
        if self.has_gradients and idle:
            width_in, width_out = idle[0].shape[-2:]
            raise InputError(
                f"a layer {width_in} -> {width_out} runs without gradients in a forward that has "
                "them, and would not be searched: use gradient checkpointing with "
                "use_reentrant=False; if the model itself runs it under torch.no_grad, name it in "
                "exclude_modules"
            )


class RankBranches(nn.Module):
    """K rank branches of one layer: which columns of A and B each has, alpha and the gates. What
    they are put on, and A and B themselves, are the subclasses'.

    Args of _set_branches:
        shape: of the layer, (in, out) or (experts, in, out).
        ranks: K candidate ranks, distinct integers >= 0; 0 means no adapter. Of a layer whose
            smaller side is below a candidate, that candidate is the largest that fits.
        scaling: s, the same for all ranks, PEFT's lora_alpha / r.
        branches: "independent" or "nested".

    Attributes:
        ranks: the candidates that fit the layer, distinct, ascending.
        shape: as given.
        used: number of columns that belong to branches; the first of R.
        membership: (R, K) of 0 and 1, the columns of each candidate.
        alpha: float32 parameter (K,), the architecture weights, zeros at the start.
        gates: g for the coming forwards, (R,) or one row per example (rows, R), set by a Supernet;
            None: softmax(alpha) decides.
        trains_weights: whether gradients of A and B are wanted of the coming forwards.
        shared: of all layers of a Supernet.

    Raises:
        InputError: unusable ranks, branches or scaling; no rank above 0 fits the layer.
    """

    def _set_branches(
        self,
        shape: tuple[int, ...],
        ranks: list[int] | tuple[int, ...],
        scaling: float,
        branches: str,
        device: torch.device | None,
    ) -> None:
        candidates, smaller = check_ranks(ranks), min(shape[-2:])
        usable = usable_ranks(shape, candidates)
        if usable[-1] == 0:
            lowest = next(rank for rank in candidates if rank > 0)
            raise InputError(
                f"ranks={list(candidates)}: rank {lowest} is above {smaller}, the smaller side of "
                f"a layer {shape[-2]} -> {shape[-1]}"
            )
        if branches not in ("independent", "nested"):
            raise InputError(f"branches={branches!r}: must be independent or nested")
        if not scaling > 0:
            raise InputError(f"scaling={scaling!r}: must be above 0")
        self.shape, self.ranks = shape, tuple(sorted(set(usable)))
        self.scaling, self.branches = float(scaling), branches
        total, self.used = (
            sum(each) if branches == "independent" else each[-1]
            for each in (candidates, self.ranks)
        )
        # R is the same for all layers of a model, also for those that few candidates fit
        columns = -(-total // ALIGNMENT) * ALIGNMENT
        membership = torch.zeros(columns, len(candidates), device=device)
        for k, rank in enumerate(usable):
            membership[branch_columns(self.ranks, rank, branches), k] = 1
        self.register_buffer("membership", membership, persistent=False)
        self.alpha = nn.Parameter(torch.zeros(len(candidates), device=device))
        self.gates: Tensor | None = None
        self.trains_weights = True
        self.shared = Forward()

    def note_call(self) -> None:
        """Tell the model's forward whether this call has gradients: some have one among several."""
        learns = self.shared.learns
        learns[self] = learns.get(self, False) or torch.is_grad_enabled()

    def probabilities(self) -> Tensor:
        """softmax(alpha), (K,)."""
        return self.alpha.softmax(0)

    def extra_repr(self) -> str:
        return f"ranks={list(self.ranks)}, scaling={self.scaling}, branches={self.branches}"
