"""Whether a model that is to generate sees no later token: else it would be taught with the answer.
Not here: which models are loaded, and how (models.py)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from darts_lora.base.errors import InputError, one_line

TOKENS = 4  # of the probe


def check_decoder(config: PretrainedConfig, name: str) -> None:
    """Raises InputError for an encoder and a decoder: no prompt goes before an answer in one
    sequence there."""
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise InputError(
            f"model_name_or_path={name!r}: {config.model_type} has an encoder and a decoder, which "
            "are not supported; choose a decoder (as Llama's), or task=classification"
        )


@torch.no_grad()
def check_causal(model: PreTrainedModel, name: str) -> None:
    """Change the last token of a tiny input and look whether logits before it move. A model that
    cannot run on such an input is told of in a warning.

    Raises:
        InputError: they do: what predicts an answer has seen it.
    """
    try:
        logits = _probe(model)
    except Exception as error:  # kernels for a GPU alone, models that want an image: any kind
        warnings.warn(
            f"{name}: cannot tell whether it attends to later tokens ({one_line(error)})",
            stacklevel=2,
        )
        return
    moved = (logits[0] - logits[1]).abs().amax(-1)
    # Equal to the last bit in most models; a mixture of experts groups tokens anew.
    noise = torch.finfo(model.dtype).eps ** 0.5 if model.dtype.is_floating_point else 0.1
    if moved[:-1].max() > noise * moved[-1]:
        raise InputError(
            f"model_name_or_path={name!r}: {type(model).__name__} attends to later tokens, so each "
            "token of an answer would be seen by what predicts it; choose a model that was trained "
            "to generate, or task=classification"
        )


def _probe(model: PreTrainedModel) -> Tensor:
    """Logits, float32 (2, TOKENS, vocabulary), of two sequences that differ in the last token."""
    embedding: Any = model.get_input_embeddings().weight
    tokens = torch.arange(1, TOKENS + 1, device=embedding.device) % embedding.shape[0]
    pair = tokens.repeat(2, 1)
    pair[1, -1] = 0
    training = model.training
    try:
        mask = torch.ones_like(pair)
        return model.eval()(input_ids=pair, attention_mask=mask, use_cache=False).logits.float()
    finally:
        model.train(training)
