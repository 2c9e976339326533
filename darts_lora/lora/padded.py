"""Adapters for engines that serve: one rank, one alpha and a list of targets for all layers.
Not here: PEFT's own patterns of ranks (genotype.py), nor who asks for it (finetune.py)."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from darts_lora.base.errors import InputError
from darts_lora.base.files import write_into
from darts_lora.lora.adapter import PREFIX, survives
from darts_lora.lora.mixed_linear import linear_shape
from darts_lora.lora.parts import layer_type


def save_padded(base: nn.Module, adapter: str, output_dir: str) -> None:
    """A saved adapter as every engine reads it, with the same outputs. All layers of the types
    that it adapts get its largest rank, filled up with zeros, and one alpha / r.

    llama.cpp reads one lora_alpha. SGLang refuses patterns, and a regex in target_modules. TGI and
    LoRAX drop a type of which one layer has no LoRA. So no pattern, no rsLoRA and no regex are
    left, and lora_alpha is an integer where it is whole.

    Args:
        base: the model that the adapter is of, with adapters in it or without.
        adapter, output_dir: folders, in PEFT's format.

    Raises:
        InputError: the adapter is a variant that engines do not read, or cannot be written.
    """
    config = LoraConfig.from_pretrained(adapter)
    check_servable(config.init_lora_weights, config.use_dora, config.target_parameters)
    state = load_file(os.path.join(adapter, SAFETENSORS_WEIGHTS_NAME))
    divisor = math.sqrt if config.use_rslora else float
    scaling = config.lora_alpha / divisor(config.r)
    for key in [key for key in state if ".lora_B." in key]:  # what one alpha for all cannot say
        module = key.split(".lora_B.")[0].removeprefix(PREFIX)
        alpha = _of_pattern(config.alpha_pattern, module, config.lora_alpha)
        own = alpha / divisor(_of_pattern(config.rank_pattern, module, config.r))
        if not math.isclose(own, scaling):
            state[key] = state[key] * (own / scaling)
    modules = dict(_plain_modules(base))
    state = pad_to_max_rank(_with_whole_types(state, modules))
    config.r = max(value.shape[0] for key, value in state.items() if ".lora_A." in key)
    config.lora_alpha = _whole(scaling * config.r)
    config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
    config.init_lora_weights = True  # how B = 0 came about is of no use to an engine
    model = base.get_base_model() if isinstance(base, PeftModel) else base
    config.target_modules = _targets(model, modules, _adapted(state)) or config.target_modules

    def write(folder: str) -> None:
        config.save_pretrained(folder)
        save_file(state, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), {"format": "pt"})

    write_into(output_dir, write, SAFETENSORS_WEIGHTS_NAME)


def check_servable(init: bool | str | None, use_dora: bool, stacked: list[str] | None) -> None:
    """Whether engines can read such an adapter at all.

    Args:
        init: PEFT's init_lora_weights; use_dora: PEFT's.
        stacked: names of 3-D parameters of experts among what is adapted.

    Raises:
        InputError: they cannot.
    """
    reason = None
    if isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        reason = f"init_lora_weights={init!r} changes the base model, of which engines know nothing"
    if use_dora:
        reason = "use_dora=true has magnitudes, which engines do not read"
    if stacked:
        reason = f"{stacked[0]} is a parameter of experts, which engines do not read as PEFT does"
    if reason:
        raise InputError(f"pad_to_max=true: {reason}; leave pad_to_max out, and merge the adapter")


def pad_to_max_rank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's weights with zeros up to its largest rank: the same outputs, one rank for all.

    Args:
        state: keys and tensors of an adapter_model.safetensors.
    """
    largest = max(value.shape[0] for key, value in state.items() if ".lora_A." in key)
    padded = {}
    for key, value in state.items():
        if ".lora_A." in key:
            value = F.pad(value, (0, 0, 0, largest - value.shape[0]))
        elif ".lora_B." in key:
            value = F.pad(value, (0, largest - value.shape[1]))
        padded[key] = value
    return padded


def _with_whole_types(state: dict[str, Tensor], modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """`state` with A and B, of rank 1 and zero, for each linear layer whose type is adapted
    elsewhere in the model."""
    adapted = _adapted(state)
    types = {layer_type(name) for name in adapted}
    dtype = next(value.dtype for key, value in state.items() if ".lora_A." in key)
    zeros = {}
    for name, module in modules.items():
        shape = linear_shape(module)
        if shape is not None and name not in adapted and layer_type(name) in types:
            zeros[f"{PREFIX}{name}.lora_A.weight"] = torch.zeros(1, shape[0], dtype=dtype)
            zeros[f"{PREFIX}{name}.lora_B.weight"] = torch.zeros(shape[1], 1, dtype=dtype)
    return state | zeros


def _adapted(state: dict[str, Tensor]) -> set[str]:
    return {key.split(".lora_A.")[0].removeprefix(PREFIX) for key in state if ".lora_A." in key}


def _targets(model: nn.Module, names: dict[str, nn.Module], adapted: set[str]) -> list[str] | None:
    """The shortest list that PEFT matches to these layers and no others: of the last parts of
    their names, or of whole names."""
    for targets in ({name.rpartition(".")[2] for name in adapted}, adapted):
        config = LoraConfig(target_modules=sorted(targets))
        hit = {name for name in names if check_target_module_exists(config, name)}
        if hit == adapted and survives(model, sorted(targets)):
            return sorted(targets)
    warnings.warn(
        "pad_to_max: no list of names is of the adapted layers alone, so target_modules stays a "
        "regex, which SGLang refuses",
        stacklevel=3,
    )
    return None


def _plain_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a model as they are without PEFT's adapter in it."""
    if isinstance(module, PeftModel):
        module = module.get_base_model()
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, ModulesToSaveWrapper):
        module = module.original_module
    yield name, module
    for child_name, child in module.named_children():
        yield from _plain_modules(child, f"{name}.{child_name}" if name else child_name)


def _of_pattern(pattern: dict[str, int], module: str, default: int) -> int:
    return pattern.get(get_pattern_key(list(pattern), module), default)


def _whole(alpha: float) -> float | int:
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
