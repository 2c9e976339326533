"""A frozen base stays as it is: normalization layers must not follow the batches.
Not here: which parameters are frozen (supernet.py), nor what is trained in full (targets.py)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils.hooks import RemovableHandle


def hold_statistics(model: nn.Module, trained: Iterable[nn.Module] = ()) -> list[RemovableHandle]:
    """Layers with running statistics (BatchNorm and its kind) compute with these in training mode
    too, and leave them as they are: an adapter does not hold them, so whoever loads it computes
    with the base's own.

    Args:
        trained: modules that are trained in full, with all that is in them.

    Returns:
        Handles: `remove()` of each lets its layer follow the batches again.
    """
    followed = {id(inner) for module in trained for inner in module.modules()}
    return [
        module.register_forward_pre_hook(_evaluate)
        for module in model.modules()
        if isinstance(module, _NormBase | _SpectralNorm) and id(module) not in followed
    ]


def _evaluate(module: nn.Module, args: tuple) -> None:
    module.eval()
