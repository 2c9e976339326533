"""Adapters as PEFT is asked for them, and whether it gave what was asked: before a search on a
trial, after every injection on the model. Not here: where the ranks come from (genotype.py)."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from darts_lora.base.errors import InputError, one_line, told_as
from darts_lora.base.files import write_into
from darts_lora.lora.parts import layer_type

PREFIX = "base_model.model."


def lora_config(
    ranks: Mapping[str, int],
    stacked: Collection[str],
    scaling: float,
    model: nn.Module | None = None,
    **options: Any,
) -> LoraConfig:
    """What gives each layer its rank and the same scaling, lora_alpha / r, to all. With use_rslora
    the same lora_alpha to all: a layer of the mean rank has that scaling, as lora_alpha / sqrt(r).

    Args:
        ranks: name -> rank, all above 0.
        stacked: the names among them that are 3-D parameters, of experts.
        model: where given, ways around what PEFT rewrites for it are taken.
        options: further LoraConfig fields.
    """
    largest, mean = max(ranks.values()), sum(ranks.values()) / len(ranks)
    shared = scaling * math.sqrt(mean) if options.get("use_rslora") else None
    keys = {name: name for name in ranks}
    modules = [name for name in ranks if name not in stacked]
    # a string is matched in full, a list would match suffixes of other names as well
    targets: str | list[str] = "|".join(map(re.escape, modules)) or []
    if model is not None and modules and not survives(model, targets):
        leaves = {name.rpartition(".")[2] for name in modules}
        lost = {leaf for leaf in leaves if not survives(model, [leaf])}
        # what PEFT takes for the name of an expert: by its weight, a parameter like any other
        keys |= {n: f"{n}.weight" for n in modules if n.rpartition(".")[2] in lost}
        targets = [name for name in modules if keys[name] == name]
    parameters = [keys[n] for n in ranks if n in stacked or keys[n] != n]
    pattern = {f"^{re.escape(keys[name])}$": rank for name, rank in ranks.items()}
    pattern = {key: r for key, r in pattern.items() if r != largest}
    alpha: Any = shared or scaling * largest  # PEFT takes fractions too
    return LoraConfig(
        r=largest,
        lora_alpha=alpha,
        target_modules=targets,
        target_parameters=parameters or None,
        rank_pattern=pattern,
        alpha_pattern={} if shared else {key: scaling * rank for key, rank in pattern.items()},
        **options,
    )


def survives(model: nn.Module, targets: str | list[str]) -> bool:
    """Whether PEFT leaves these target_modules as they are. It rewrites them for models whose
    experts were modules before transformers 5. A regular expression becomes a list of name endings,
    and names that experts had then become those of the experts' parameters."""
    config = LoraConfig(target_modules=targets)
    before = copy.copy(config.target_modules)
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of two names that are one parameter now
        return False
    return config.target_modules == before and not config.target_parameters


def add_lora(
    model: nn.Module, config: LoraConfig, ranks: Mapping[str, int], saved: Collection[str]
) -> PeftModel:
    """peft.get_peft_model, and a look at what came of it.

    Args:
        ranks: the rank that each layer or 3-D parameter is to have; 0, or not there: none.
        saved: names of the modules that are to be trained in full.

    Raises:
        InputError: PEFT refuses the configuration, or its adapter is another one.
    """
    refusal = told_as("genotype: PEFT refuses it", ValueError, NotImplementedError, TypeError)
    with refusal, warnings.catch_warnings():
        # of the keys of parameters, which do have their rank; of EVA, in an empty model
        warnings.filterwarnings("ignore", ".*did not match any targeted module", RuntimeWarning)
        warnings.filterwarnings("ignore", ".*low_cpu_mem_usage=False")
        adapted = get_peft_model(model, config)
    check_adapter(adapted, ranks, saved)
    return adapted


def save_fresh(
    model: nn.Module,
    config: LoraConfig,
    ranks: Mapping[str, int],
    saved: Collection[str],
    folder: str | os.PathLike,
) -> None:
    """An adapter as PEFT begins it (B = 0), saved into `folder`. The model stays as it is.

    Raises:
        InputError: as add_lora's, or the folder cannot be written.
    """
    with _same_flags(model):
        adapted = add_lora(_shell(model, {}), config, ranks, saved)
        write_into(folder, adapted.save_pretrained, SAFETENSORS_WEIGHTS_NAME)


@contextlib.contextmanager
def _same_flags(model: nn.Module) -> Iterator[None]:
    """What of the model is trained is the same behind this block as before it."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def check_adapter(model: nn.Module, ranks: Mapping[str, int], saved: Collection[str]) -> None:
    """PEFT's adapter on `model` has these ranks and no others. What is trained is its A and B,
    DoRA's magnitudes and the modules in `saved`, and nothing else.

    Raises:
        InputError: it is another adapter.
    """
    have = adapted_ranks(model)
    for name in dict.fromkeys([*ranks, *have]):
        if have.get(name, 0) != ranks.get(name, 0):
            raise InputError(
                f"genotype: PEFT gives {name} rank {have.get(name, 0)}, not {ranks.get(name, 0)}"
            )
    names = [name.removeprefix(PREFIX) for name, p in model.named_parameters() if p.requires_grad]
    in_full = tuple(f"{name}.modules_to_save." for name in saved)
    own = re.compile(r"\.lora_([AB]|magnitude_vector)\.")
    for name in names:
        if not own.search(name) and not name.startswith(in_full):
            raise InputError(f"genotype: PEFT trains {name}, which it does not name")
    modules = dict(model.named_modules())
    modules = {name.removeprefix(PREFIX): module for name, module in modules.items()}
    for name in saved:
        if not isinstance(modules.get(name), ModulesToSaveWrapper):
            raise InputError(f"genotype: PEFT does not train {name} in full")


def adapted_ranks(model: nn.Module) -> dict[str, int]:
    """Name of each module or 3-D parameter with PEFT's LoRA -> its rank."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = name.removeprefix(PREFIX).replace(".base_layer", "")
            if isinstance(module, ParamWrapper) and module._param_ndim == 3:
                name = f"{name}.{module.parameter_name}"
            (found[name],) = module.r.values()
    return found


def refused(model: nn.Module, names: Collection[str], stacked: Collection[str]) -> dict[str, str]:
    """Which of these layers PEFT does not adapt as it is asked to -> why, in words. Nothing of the
    model is changed; nothing is computed, and no memory is taken for weights.

    Raises:
        InputError: PEFT adapts what is not asked for, whichever layers are left out.
    """
    reasons: dict[str, str] = {}
    left = list(names)
    if not left or _refusal(model, left, stacked) is None:
        return reasons
    modules = dict(model.named_modules())
    kinds: dict[tuple[str, type], list[str]] = {}
    for name in left:  # what is of one type, PEFT takes or refuses alike
        kinds.setdefault((layer_type(name), type(modules.get(name))), []).append(name)
    for members in kinds.values():
        reason = _refusal(model, members, stacked)
        if reason is not None:
            reasons |= dict.fromkeys(members, reason)
    left = [name for name in left if name not in reasons]
    reason = _refusal(model, left, stacked) if left else None
    if reason is not None:
        raise InputError(f"target_modules: PEFT does not adapt these layers together ({reason})")
    return reasons


def _refusal(model: nn.Module, names: list[str], stacked: Collection[str]) -> str | None:
    """Why PEFT does not give these layers ranks 1 and 2 in turns, or not when the adapter is loaded
    again; None where it does."""
    ranks = {name: 1 + i % 2 for i, name in enumerate(names)}
    config = lora_config(ranks, stacked, 1.0, model)
    try:
        with warnings.catch_warnings(), _same_flags(model):
            warnings.simplefilter("ignore")
            shell = get_peft_model(_shell(model, {}), config, low_cpu_mem_usage=True)
            check_adapter(shell, ranks, ())
            state = get_peft_model_state_dict(shell, save_embedding_layers=False)
            loaded: Any = set_peft_model_state_dict(shell, state, low_cpu_mem_usage=True)
        lost = [key for key in loaded.missing_keys if ".lora_" in key] + loaded.unexpected_keys
        if lost:
            return f"the saved adapter would not be loaded again, first {lost[0]}"
    except InputError as error:
        return str(error).removeprefix("genotype: ")
    except Exception as error:  # of any kind: PEFT has many layers, and the packages behind them
        return one_line(error)
    return None


def _shell(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Other modules around the same tensors: what is put into it is not in `module`."""
    if id(module) not in made:
        made[id(module)] = shell = object.__new__(type(module))  # parametrized ones forbid copies
        vars(shell).update(vars(module))
        shell._parameters = dict(module._parameters)
        shell._buffers = dict(module._buffers)
        shell._modules = {}
        for name, child in module._modules.items():
            shell._modules[name] = None if child is None else _shell(child, made)
    return made[id(module)]
