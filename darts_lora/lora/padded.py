"""Padded adapters: zeros up to the largest rank, for engines that read one rank for all layers.
Not here: PEFT's own patterns of ranks (genotype.py), nor who asks for it (finetune.py)."""

from __future__ import annotations

import math
import os

import torch.nn.functional as F
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from darts_lora.base.files import write_into


def save_padded(adapter: str, output_dir: str) -> None:
    """A saved adapter with zeros up to its largest rank, and one rank for all modules: the same
    outputs for engines that read r and lora_alpha alone.

    Args:
        adapter, output_dir: folders, in PEFT's format.
    """
    config = LoraConfig.from_pretrained(adapter)
    state = load_file(os.path.join(adapter, SAFETENSORS_WEIGHTS_NAME))
    divisor = math.sqrt if config.use_rslora else float
    scaling = config.lora_alpha / divisor(config.r)
    for key in [key for key in state if ".lora_B." in key]:  # what one alpha for all cannot say
        module = key.split(".lora_B.")[0].removeprefix("base_model.model.")
        alpha = _of_pattern(config.alpha_pattern, module, config.lora_alpha)
        own = alpha / divisor(_of_pattern(config.rank_pattern, module, config.r))
        if not math.isclose(own, scaling):
            state[key] = state[key] * (own / scaling)
    state = pad_to_max_rank(state)
    # the largest rank of what is there; the scaling is the same for all by now
    config.r = max(value.shape[0] for key, value in state.items() if ".lora_A." in key)
    config.lora_alpha, config.rank_pattern, config.alpha_pattern = (
        scaling * divisor(config.r),
        {},
        {},
    )

    def write(folder: str) -> None:
        config.save_pretrained(folder)
        save_file(state, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), {"format": "pt"})

    write_into(output_dir, write, SAFETENSORS_WEIGHTS_NAME)


def _of_pattern(pattern: dict[str, int], module: str, default: int) -> int:
    return pattern.get(get_pattern_key(pattern.keys(), module), default)


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
