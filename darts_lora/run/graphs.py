"""CUDA graphs: a function of a batch, captured once for each shape of the batch, then replayed.
What models do by values that the host reads from the device, Static does without reading them.
Not here: what is computed (search.py, architect.py)."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Hashable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map


class Graphed:
    """A function of a batch whose work on the GPU is launched as one graph.

    Small kernels cost more to launch than to compute; a graph launches them all at once. Random
    numbers drawn inside are fresh in each replay. The function must not wait for the device (but
    see Static), and must read everything else that changes between its calls from the same
    tensors. It may change things: each call does so once. The first call
    of a shape is launched as ever, the second one is captured, so a shape that comes once costs
    nothing.

    Args:
        function: batch (tensors in dicts, lists, tuples) -> (scalar loss, list of tensors).
        limit: captured shapes; further ones run without a graph.
        pool: memory pool, shared by functions whose results are used up before the next call.

    What cannot be captured runs without a graph, after one warning that says why.
    """

    def __init__(
        self,
        function: Callable[[Any], tuple[Tensor, list[Tensor]]],
        *,
        limit: int = 32,
        pool: Any = None,
    ):
        self.function, self.limit, self.pool = function, limit, pool
        self.captured: dict[Hashable, tuple] = {}
        self.seen: set[Hashable] = set()
        self.failed = False

    def __call__(self, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """The function's result. The list's tensors are overwritten by the next call."""
        shape = self._shape(batch)
        if shape not in self.captured:
            if self.failed or len(self.captured) >= self.limit:
                return self.function(batch)
            if shape not in self.seen:
                self.seen.add(shape)
                return self._aside(batch)
            if not self._capture(shape, batch):
                return self.function(batch)
        graph, static, (loss, values) = self.captured[shape]
        torch._foreach_copy_(_tensors(static), _tensors(batch))
        graph.replay()
        return loss.clone(), values

    def _shape(self, batch: Any) -> Hashable:
        leaves, structure = tree_flatten(batch)
        shapes = (
            (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        )
        return str(structure), *shapes

    def _capture(self, shape: Hashable, batch: Any) -> bool:
        """Capture the function for a batch of this shape; whether it is there now."""
        static = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
        try:
            with warnings.catch_warnings():
                # gradients are returned here, none is accumulated
                warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
                stream = _side_stream(torch.cuda.current_device())
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool, stream=stream), Static():
                    result = self.function(static)
        except RuntimeError as error:
            self.failed = True
            reason = str(error).strip().split("\n")[0][:200]
            warnings.warn(f"no CUDA graph, steps are launched one by one: {reason}", stacklevel=2)
            torch.cuda.synchronize()
            _draw_outside_again()
            return False
        self.captured[shape] = graph, static, result
        return True

    def _aside(self, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """The function's result, computed on the stream of captures: libraries allocate and tune in
        their first calls there, which cannot be captured."""
        stream, current = _side_stream(torch.cuda.current_device()), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
            result = self.function(batch)
        current.wait_stream(stream)
        return result


def _draw_outside_again() -> None:
    """After a failed capture the generator thinks that it goes on, and refuses random numbers."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps 64 MiB for each stream that it has ever worked on."""
    return torch.cuda.Stream(device)


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)]


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
