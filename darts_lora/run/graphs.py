"""CUDA graphs: a function of a batch, captured once for each shape of the batch, then replayed.
Not here: what is computed (search.py, architect.py), nor what in a model may wait (static.py)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from darts_lora.run.static import Static


class Graphed:
    """A function of a batch whose work on the GPU is launched as one graph.

    Small kernels cost more to launch than to compute; a graph launches them all at once. Random
    numbers drawn inside are fresh in each replay. The function must not wait for the device (but
    see static.py), and must read everything else that changes between its calls from the same
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
