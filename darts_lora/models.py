"""Base models and their processors, by transformers' Auto classes; the embedded default's folder.
Not here: adapters and search layers (supernet.py, finetune.py), nor what a batch looks like."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from darts_lora.config import ModelConfig
from darts_lora.errors import InputError

EMBEDDED = Path(__file__).parent / "embedded"


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The base model with its weights, on the CPU, in evaluation mode.

    Raises:
        InputError: the model is not there, or its files cannot be loaded.
    """
    model = _load(auto_class(_load(AutoConfig, config)), config, dtype=config.dtype)
    if config.gradient_checkpointing:
        # The re-entrant kind gives no gradients where, as here, the model's input needs none.
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.get_text_config().use_cache = False
    return model


def auto_class(config: PretrainedConfig) -> type:
    """The Auto class that builds a model of this configuration."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_processor(config: ModelConfig) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The model's processor; the tokenizer alone where the model takes text only.

    Raises:
        InputError: it is not there, or cannot be loaded.
    """
    processor = _load(AutoProcessor, config)
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # labels mask padding by position, not by token
    return processor


def _load(loader: type, config: ModelConfig, **options):
    name = config.model_name_or_path
    source = str(EMBEDDED / "model") if name == "embedded" else name
    try:
        return loader.from_pretrained(source, trust_remote_code=config.trust_remote_code, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        kind = (
            "cannot be loaded" if os.path.isdir(source) else "no local folder, no model of the hub"
        )
        raise InputError(
            f"model_name_or_path={name!r}: {kind} ({reason}); "
            "give a hub name, a folder written by save_pretrained, or embedded"
        ) from error
