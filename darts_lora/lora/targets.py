"""Which modules of a model are searched, which are trained in full: PEFT's matching and presets.
Not here: what is put into their place (supernet.py, finetune.py)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from darts_lora.base.bounds import check_names
from darts_lora.base.errors import InputError
from darts_lora.config import ALL_EXPERTS
from darts_lora.lora.experts import expert_tensors, stacked_tensors
from darts_lora.lora.mixed_linear import linear_shape
from darts_lora.lora.parts import PARTS, heads, model_parts, task_type, within


def match_modules(
    model: nn.Module,
    target_modules: str | list[str],
    exclude_modules: str | list[str] | None = None,
) -> list[str]:
    """Names of the modules that PEFT would put a LoRA on, in the model's order; PEFT decides.

    Beside what PEFT knows, `target_modules` may name parts of the model (see model_parts), one or
    several: "vision", "connector+language".

    Raises:
        InputError: nothing matches (the message names the nearest module names), or a name that no
            genotype can hold.
    """
    parts = target_modules.split("+") if isinstance(target_modules, str) else [""]
    named_parts = set(parts) <= set(PARTS)
    lora: Any = LoraConfig(
        target_modules="all-linear" if named_parts else target_modules,
        exclude_modules=exclude_modules,
        modules_to_save=_fresh(model) or None,
        task_type=task_type(model),
    )
    lora = _maybe_include_all_linear_layers(lora, model)
    names = [name for name, _ in model.named_modules() if name]
    matched = [name for name in names if check_target_module_exists(lora, name)]
    if named_parts:
        part_of = model_parts(model)
        matched = [name for name in matched if part_of[name] in parts]
    if not matched:
        _raise_no_match(model, names, target_modules, exclude_modules)
    check_names("target_modules", matched)
    return matched


def match_parameters(
    model: nn.Module,
    target_parameters: str | list[str] | None,
    target_modules: str | list[str] = "all-linear",
    exclude_modules: str | list[str] | None = None,
) -> dict[str, tuple[int, int, int]]:
    """Name -> (experts, in, out) of the 3-D parameters of experts that are searched, in the model's
    order.

    Args:
        target_parameters: ends of names, as in PEFT; or "all-experts", of the parts of the model
            that target_modules names, if it does; None: none.
        exclude_modules: as of match_modules; matches the parameters' names and their modules'.

    Raises:
        InputError: nothing matches.
    """
    wanted = [target_parameters] if isinstance(target_parameters, str) else target_parameters or []
    if wanted == [ALL_EXPERTS]:
        found = expert_tensors(model)
        parts = target_modules.split("+") if isinstance(target_modules, str) else [""]
        if set(parts) <= set(PARTS):
            part_of = model_parts(model)
            found = {name: shape for name, shape in found.items() if part_of[name] in parts}
        matched = [ALL_EXPERTS] if found else []
    else:
        found, stacked, matched = {}, stacked_tensors(model), []
        for name, shape in stacked.items():
            keys = [key for key in wanted if f".{name}".endswith(f".{key}")]
            found |= {name: shape} if keys else {}
            matched += keys
    for key in wanted:
        if key not in matched:
            near = difflib.get_close_matches(key, stacked_tensors(model), cutoff=0.3)
            near = near or list(expert_tensors(model))[:3]
            raise InputError(
                f"target_parameters={target_parameters!r}: {key!r} matches no 3-D parameter; "
                f"nearest names: {', '.join(near) or 'the model has none'}"
            )
    if exclude_modules is None:
        return found
    lora = LoraConfig(target_modules=exclude_modules)
    kept = {}
    for name, shape in found.items():
        owner = name.rpartition(".")[0]
        if not any(check_target_module_exists(lora, each) for each in (name, owner)):
            kept[name] = shape
    return kept


def match_saved_modules(model: nn.Module, modules_to_save: list[str] | None) -> list[str]:
    """Names of the modules that are trained in full and saved with the adapter, as PEFT matches
    them: by the end of their names. The head of a classification model is always one of them, and
    so is what its checkpoint has no weights for.

    Raises:
        InputError: a name that matches no module.
    """
    names = [name for name, _ in model.named_modules() if name]
    for key in modules_to_save or ():
        if not any(name.endswith(key) for name in names):
            near = difflib.get_close_matches(key, names) or [n for n in names if "." not in n]
            raise InputError(
                f"modules_to_save={modules_to_save!r}: {key!r} matches no module; nearest names: "
                f"{', '.join(near)}"
            )
    keys, whole = tuple(modules_to_save or ()), {*heads(model), *_fresh(model)}
    matched = [name for name in names if (keys and name.endswith(keys)) or name in whole]
    check_names("modules_to_save", matched)
    inside = [n for n in matched if any(n != outer and within(n, outer) for outer in matched)]
    return [name for name in matched if name not in inside]


def outside(names: Collection[str], outer: Collection[str]) -> list[str]:
    """Those of the names that are not of a module in `outer`, nor inside one."""
    inside = tuple(f"{name}." for name in outer)
    return [name for name in names if not f"{name}.".startswith(inside)]


def check_unshared(model: nn.Module, names: Collection[str]) -> None:
    """No module, or parameter of experts, in `names` holds a weight that another module of the
    model holds as well (see shared_weights).

    Raises:
        InputError: one does.
    """
    for name, reason in shared_weights(model, names).items():
        raise InputError(
            f"target_modules: {name} {reason}; name it in exclude_modules, or load the model with "
            "weights of their own (tie_word_embeddings=False)"
        )


def shared_weights(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Which of these modules, or parameters of experts, hold a weight that another module of the
    model holds as well, as tied embeddings do -> which. An adapter is of one module, but merged
    into the weight it would change both."""
    found: dict[str, str] = {}
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    modules = dict(model.named_modules())
    for name in names:
        owner = name if name in modules else name.rpartition(".")[0]
        held = modules[owner].parameters(recurse=False)
        for parameter in held if owner == name else [model.get_parameter(name)]:
            others = [other for other in holders[id(parameter)] if other != owner]
            if others:
                text = f"shares a weight with {others[0]}, where a merged adapter would change it"
                found.setdefault(name, f"{text} too")
    return found


def check_fresh(model: PeftModel, source: str) -> None:
    """What the base's checkpoint has no weights for is trained in full and saved with the adapter.

    Args:
        source: the option, and its value, that says what is saved.

    Raises:
        InputError: it is not, and so would be another one at each load.
    """
    base = model.get_base_model()
    modules = base.named_modules()
    saved = [name for name, module in modules if isinstance(module, ModulesToSaveWrapper)]
    for name in _fresh(base):
        if not any(within(name, outer) for outer in saved):
            raise InputError(
                f"{source}: the model's checkpoint has no weights for {name}, and modules_to_save "
                "does not name it; search and finetune with this model anew"
            )


def _fresh(model: nn.Module) -> list[str]:
    return getattr(model, "fresh_modules", [])  # load_model's


def check_matches(
    model: nn.Module, lora_config: LoraConfig, wanted: Collection[str], saved: list[str]
) -> None:
    """A genotype's LoraConfig gives LoRA to the modules in `wanted` and trains those in `saved`, as
    PEFT matches them, and no others; every key of its patterns is of one module.

    Raises:
        InputError: it does not.
    """
    names = [name for name, _ in model.named_modules()]
    parameters = lora_config.target_parameters or []
    _check_keys(lora_config, [*names, *parameters])
    targets = {name for name in names if check_target_module_exists(lora_config, name)}
    have = [name for name, _ in model.named_parameters()]
    for key in parameters:
        hits = [name for name in have if f".{name}".endswith(f".{key}")]
        if hits != [key]:
            raise InputError(
                f"genotype: the parameter {key!r} is {len(hits)} in the model, not one"
            )
        targets.add(key if key in wanted else key.removesuffix(".weight"))
    if targets != set(wanted):
        raise InputError(
            f"genotype: target_modules matches {len(targets)} modules, not {len(wanted)}"
        )
    _check_saved(saved, names)


def _check_keys(lora_config: LoraConfig, names: list[str]) -> None:
    """Every key of the patterns matches exactly one name, as PEFT matches them."""
    for key in lora_config.rank_pattern:
        compiled = re.compile(rf"(.*\.)?({key})$")
        hits = [name for name in names if compiled.match(name)]
        if len(hits) != 1:
            raise InputError(f"genotype: the pattern {key!r} matches {len(hits)} modules, not one")


def _check_saved(saved: list[str], names: list[str]) -> None:
    """PEFT, which matches by the end of names, trains these modules and no others."""
    for name in saved:
        if name not in names:
            raise InputError(f"genotype: modules_to_save={saved!r}: {name!r} is not in the model")
        more = [n for n in names if n.endswith(name) and n not in saved]
        if more:
            raise InputError(
                f"genotype: modules_to_save={saved!r}: PEFT would train {more[0]!r} as well, whose "
                f"name ends like {name!r}"
            )


def _raise_no_match(model: nn.Module, names: list[str], target_modules, exclude_modules) -> None:
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    known = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if linear_shape(m)})
    near = [m for w in wanted for m in difflib.get_close_matches(w, known + names, cutoff=0.3)]
    parts = sorted(set(model_parts(model).values()))
    given = f"target_modules={target_modules!r}"
    if exclude_modules is not None:
        given += f", exclude_modules={exclude_modules!r}"
    raise InputError(
        f"{given}: matches no module; nearest names: {', '.join(dict.fromkeys(near or known))}; "
        f"parts of this model: {', '.join(parts)}"
    )


def current_names(names: Collection[str], modules: Collection[str], model: nn.Module) -> list[str]:
    """`names`; those that are not in `modules` renamed as transformers renames old checkpoints."""
    renamings = []
    if not set(modules) >= set(names) and isinstance(model, PreTrainedModel):
        renamings = get_model_conversion_mapping(model)
    current = []
    for name in names:
        for renaming in renamings:
            if name in modules:
                break
            name, _ = renaming.rename_source_key(name)
        current.append(name)
    return current
