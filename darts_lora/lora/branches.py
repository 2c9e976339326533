"""RankBranches: the candidate ranks of one layer, as columns of its A and B, with alpha and gates.
Not here: what a layer computes with them (mixed_linear.py, experts.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from darts_lora.base.bounds import check_ranks
from darts_lora.base.errors import InputError
from darts_lora.lora.cost import usable_ranks

ALIGNMENT = 8  # columns: 16 bytes of bfloat16


class Forward:
    """What the layers of a model share in its forward: whether it is one with gradients, and of
    each layer whether a call of it had them."""

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """Before and behind a forward, however it ended."""
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
    """K rank branches of one layer: which columns of A and B each has (rank r the first r), alpha
    and the gates. What they are put on, and A and B themselves, are the subclasses'.

    Args of _set_branches:
        shape: of the layer, (in, out) or (experts, in, out).
        ranks: K candidate ranks, distinct integers >= 0; 0 means no adapter. Of a layer whose
            smaller side is below a candidate, that candidate is the largest that fits.
        scaling: s, the same for all ranks, PEFT's lora_alpha / r.

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
        InputError: unusable ranks or scaling; no rank above 0 fits the layer.
    """

    membership: Tensor

    def _set_branches(
        self,
        shape: tuple[int, ...],
        ranks: list[int] | tuple[int, ...],
        scaling: float,
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
        if not scaling > 0:
            raise InputError(f"scaling={scaling!r}: must be above 0")
        self.shape, self.ranks = shape, tuple(sorted(set(usable)))
        self.scaling, self.used = float(scaling), self.ranks[-1]
        # R is the same for all layers of a model, also for those that few candidates fit
        columns = -(-candidates[-1] // ALIGNMENT) * ALIGNMENT
        membership = torch.zeros(columns, len(candidates), device=device)
        for k, rank in enumerate(usable):
            membership[:rank, k] = 1
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
        return f"ranks={list(self.ranks)}, scaling={self.scaling}"
