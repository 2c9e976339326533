"""Static: what models do by values that the host reads from the device, done without reading them.
Not here: the capture that cannot wait for such values (graphs.py)."""

from __future__ import annotations

import os
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Static(TorchFunctionMode):
    """Inside, models of images and text in transformers (LLaVA and its kind) never wait.

    They put image features in the places of image tokens by `masked_scatter`, whose gradient
    counts these on the host; an equal function takes its place. And they compare the numbers of
    image tokens and of features: that check is left out, so let it have passed before.
    """

    def __enter__(self):
        self.unchecked = mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1")
        self.unchecked.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.unchecked.stop()
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.masked_scatter:
            return masked_scatter(*args, **(kwargs or {}))
        if function is Tensor.__format__:  # the text of an error that is not raised
            return "a tensor"
        return function(*args, **(kwargs or {}))


def masked_scatter(tensor: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """torch.Tensor.masked_scatter, of which neither pass waits for the device.

    Args:
        tensor: any shape and dtype.
        mask: bool, of a shape that broadcasts to tensor's.
        source: of tensor's dtype; its first elements go where mask is true, in order. Has at least
            as many as that, which is not checked.
    """
    return _MaskedScatter.apply(tensor, mask.expand_as(tensor), source)


class _MaskedScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, mask: Tensor, source: Tensor) -> Tensor:
        order = mask.flatten().cumsum(0) - 1  # of each element: the last source used so far
        ctx.save_for_backward(mask, order)
        ctx.source_shape = source.shape
        taken = source.flatten()[order.clamp(min=0)]
        return torch.where(mask, taken.view(tensor.shape), tensor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        mask, order = ctx.saved_tensors
        spare = ctx.source_shape.numel()  # where all goes that no source gave
        places = torch.where(mask.flatten(), order, spare)
        to_source = grad.new_zeros(spare + 1).scatter_(0, places, grad.flatten())[:-1]
        return grad.masked_fill(mask, 0), None, to_source.view(ctx.source_shape)
