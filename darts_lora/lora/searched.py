"""Which layers a search searches: what matches, what of it no adapter would change, and the rest.
Not here: the matching itself (targets.py), why a layer is left out (probe.py)."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from darts_lora.base.errors import InputError
from darts_lora.config import SearchConfig
from darts_lora.lora.mixed_linear import linear_shape
from darts_lora.lora.probe import left_out, left_out_lines
from darts_lora.lora.targets import (
    check_unshared,
    match_modules,
    match_parameters,
    outside,
    shared_weights,
)


def searched_layers(
    model: nn.Module, config: SearchConfig, saved: list[str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Name -> shape of what is searched, in the model's order; name of each match that is not
    searched -> why, of which a warning tells.

    Args:
        saved: names of the modules that are trained in full, in which nothing is searched.

    Raises:
        InputError: nothing matches, or is left; a match is not a linear layer, or shares its
            weight; a rank above what any of them takes.
    """
    names = match_modules(model, config.target_modules, config.exclude_modules)
    shapes: dict[str, Any] = {n: linear_shape(model.get_submodule(n)) for n in names}
    no_linear = next((name for name, shape in shapes.items() if shape is None), None)
    if no_linear is not None:
        raise InputError(
            f"target_modules={config.target_modules!r}: {no_linear} is a "
            f"{type(model.get_submodule(no_linear)).__name__}, not a linear layer; name it in "
            "exclude_modules"
        )
    stacked = match_parameters(
        model, config.target_parameters, config.target_modules, config.exclude_modules
    )
    shapes = {**shapes, **stacked}
    shapes = {name: shapes[name] for name in outside(shapes, saved)}
    if not shapes:
        raise InputError(
            f"target_modules={config.target_modules!r}: nothing is left to search, every "
            "match is trained in full (modules_to_save, or a classification model's head)"
        )
    largest = config.ranks[-1]
    widest = max(shapes, key=lambda name: min(shapes[name][-2:]))
    *_, width_in, width_out = shapes[widest]
    smaller = min(width_in, width_out)
    if largest > smaller:
        raise InputError(
            f"ranks={list(config.ranks)}: rank {largest} is above {smaller}, the smaller "
            f"side of {widest} ({width_in} -> {width_out}), and no layer is wider"
        )
    without = left_out(model, shapes, stacked, config.ranks)
    if config.target_modules == "all-linear":  # nobody asked for these by name
        without |= shared_weights(model, [name for name in shapes if name not in without])
    for line in left_out_lines(without):
        warnings.warn(line, stacklevel=4)
    kept = {name: shape for name, shape in shapes.items() if name not in without}
    if not kept:
        first, reason = next(iter(without.items()))
        raise InputError(
            f"target_modules={config.target_modules!r}: nothing is left to search, first "
            f"{first}: {reason}"
        )
    check_unshared(model, kept)
    # in the model's order, also where parameters of experts are between layers
    order = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    order |= {name: order.get(f"{name}.weight", order.get(name, 0)) for name in kept}
    return dict(sorted(kept.items(), key=lambda item: order[item[0]])), without
