"""A genotype as other trainers take it: axolotl's YAML, the arguments of PEFT's LoraConfig.
Not here: adapters that trainers without patterns resume from (Genotype.save_untrained)."""

from __future__ import annotations

import json
from typing import Any

import yaml

from darts_lora.base.errors import InputError
from darts_lora.genotype import Genotype


def peft_json(genotype: Genotype) -> str:
    """JSON of what peft.LoraConfig(**...) takes.

    Raises:
        InputError: every rank is 0.
    """
    return json.dumps(_arguments(genotype), indent=1, ensure_ascii=False)


def axolotl_yaml(genotype: Genotype) -> str:
    """The lora_* options of an axolotl configuration.

    Raises:
        InputError: every rank is 0, or an alpha is no integer, which axolotl asks for.
    """
    arguments = _arguments(genotype)
    for alpha in (arguments["lora_alpha"], *arguments["alpha_pattern"].values()):
        if type(alpha) is not int:
            raise InputError(
                f"format='axolotl': takes integers for alpha, and scaling={genotype.scaling} makes "
                f"it {alpha:g} in a layer; use format=peft, or an untrained adapter "
                "(Genotype.save_untrained)"
            )
    names = {"r": "lora_r", "lora_alpha": "lora_alpha"}
    options = {names.get(name, f"lora_{name}"): value for name, value in arguments.items()}
    return yaml.safe_dump({"adapter": "lora", **options}, sort_keys=False, width=10**6)


def _arguments(genotype: Genotype) -> dict[str, Any]:
    """Fields of the LoraConfig that say which layers get which rank, alphas as integers where they
    are whole."""
    config = genotype.to_lora_config()
    whole = {key: _whole(alpha) for key, alpha in config.alpha_pattern.items()}
    arguments: dict[str, Any] = {
        "r": config.r,
        "lora_alpha": _whole(config.lora_alpha),
        "target_modules": config.target_modules or [],  # none: experts alone
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": whole,
    }
    for name in ("target_parameters", "modules_to_save"):
        if value := getattr(config, name):
            arguments[name] = sorted(value)
    return arguments


def _whole(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha
