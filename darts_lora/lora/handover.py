"""The end of a search is the middle of a finetune: what the supernet learnt, as a plain LoRA.
Not here: which rank a layer gets (discretize.py), how the finetune goes on (finetune.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from darts_lora.base.errors import InputError


def fold(b: Tensor, gates: Tensor) -> Tensor:
    """B diag(g): a layer whose gates are constants is a plain LoRA, and this is its B.

    Args:
        b: (..., out, R).
        gates: g, (R,), in units of the scaling.

    Returns:
        (..., out, R), float64.
    """
    return b.double() * gates.to(b.device, torch.float64)


def cut(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best LoRA of this rank for B A, in the Frobenius norm (Eckart and Young 1936).

    The factors come from a QR of each and an SVD of an (R, R) matrix. All rows of the new A have
    the mean norm of those of A, and B takes the singular values: an optimizer then moves both as
    fast as before.

    Args:
        a: (..., R, in); rows of zeros are no columns of the LoRA.
        b: (..., out, R).
        rank: at most the number of its columns, and at most in and out.

    Returns:
        A (..., rank, in) and B (..., out, rank), float64.

    Raises:
        InputError: the rank is above what B A can have.
    """
    a, b = a.double(), b.double()
    norms = a.norm(dim=-1)
    used = int((norms > 0).sum(-1).max())
    most = min(used, a.shape[-1], b.shape[-2])
    if rank > most:
        raise InputError(f"rank={rank}: the searched layer has {most} columns")
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    left, values, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    size = norms.sum(-1)[..., None, None] / max(used, 1)
    new_a = right[..., :rank, :] @ q_a.mT * size
    new_b = q_b @ left[..., :rank] * (values[..., None, :rank] / size.clamp_min(1e-30))
    return new_a, new_b
