"""Weights that FSDP2 shards: whole, and sharded again.
Not here: who asks for them (supernet.py, resume.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


def full(state: Any) -> Any:
    """`state` with whole tensors in place of sharded ones (FSDP2); on all processes at once."""
    return tree_map_only(DTensor, lambda value: value.full_tensor(), state)


def shard_as(own: Tensor, whole: Tensor) -> Tensor:
    """`whole` sharded over the processes as `own` is, if it is."""
    if not isinstance(own, DTensor):
        return whole
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements)
