"""The parts of a model: encoders of images and audio, language model, what joins them, the head of
a classifier. Not here: which of their layers are searched (targets.py)."""

from __future__ import annotations

import inspect
from typing import Any

from peft import TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel

from darts_lora.lora.experts import expert_tensors
from darts_lora.lora.mixed_linear import linear_shape

PARTS = ("vision", "audio", "language", "connector")
# How transformers' models name the attention of their text blocks to the image.
CROSS_ATTENTION = ("cross_attn", "crossattention", "cross_attention", "encoder_attn")


def model_parts(model: nn.Module) -> dict[str, str]:
    """Name of each linear layer, and each 3-D parameter of experts, -> the part of the model that
    it belongs to.

    vision: the blocks of image encoders, and their embeddings. audio: those of audio encoders.
    connector: what joins them and text, that is the rest of the encoders (mergers), what is in
    neither encoder nor language model (projectors, resamplers), and the cross-attention in the
    language model's blocks. language: all else; the whole of a text-only model.
    """
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if linear_shape(module)]
    layers += expert_tensors(model)
    towers = _towers(model)
    if not towers:
        return dict.fromkeys(layers, "language")
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    stacks = tuple(f"{name}." for name in lists)
    language = _language(model, list(towers))
    parts = {}
    for name in layers:
        tower = next((tower for tower in towers if within(name, tower)), None)
        if tower is not None:
            own = name.startswith(tuple(s for s in stacks if within(s, tower)))
            own |= "embed" in name.removeprefix(tower)
            parts[name] = towers[tower] if own and "merger" not in name else "connector"
            continue
        holds = [outer for outer in language if within(name, outer)]
        # of a language model that has the encoder inside, the blocks alone are its own
        mixed = all(any(within(tower, outer) for tower in towers) for outer in holds)
        own = bool(holds) and (not mixed or name.startswith(stacks))
        cross = any(piece.startswith(CROSS_ATTENTION) for piece in name.split("."))
        parts[name] = "language" if own and not cross else "connector"
    return parts


def _towers(model: nn.Module) -> dict[str, str]:
    """Name of each encoder of images (or videos) and audio -> "vision" or "audio": what the model's
    own accessor gives, and models inside it that take no text."""
    if not isinstance(model, PreTrainedModel):
        return {}
    modules = dict(model.named_modules())
    texts = [module for module in (_decoder(model), _embeddings(model)) if module is not None]
    given = {id(model.get_encoder(modality=key)): key for key in ("audio", "image")}
    found: dict[str, str] = {}
    for name, module in modules.items():
        kinds = _modalities(module) if isinstance(module, PreTrainedModel) else set()
        kinds |= {given[id(module)]} if id(module) in given else set()
        inside = set(map(id, module.modules()))
        if not name or any(id(text) in inside for text in texts):
            continue
        own = id(module) in given or (kinds == {"audio"}) or _takes_pixels(module, kinds)
        if own and not any(within(name, outer) for outer in found):
            found[name] = "vision" if kinds & {"image", "video"} else "audio"
    return found


def _takes_pixels(module: nn.Module, kinds: set[str]) -> bool:
    """An image encoder, and no resampler of what one gives."""
    if not kinds or "text" in kinds:
        return False
    return any(name.startswith("pixel") for name in inspect.signature(module.forward).parameters)


def _modalities(module: PreTrainedModel) -> set[str]:
    kinds = module.input_modalities
    return {kinds} if isinstance(kinds, str) else set(kinds)


def _decoder(model: PreTrainedModel) -> nn.Module | None:
    decoder = model.get_decoder()
    return None if decoder is model else decoder


def _embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        found = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # of models that say nothing of them
        return None
    return found if isinstance(found, nn.Embedding) else None


def _language(model: Any, towers: list[str]) -> list[str]:
    """Names of what computes on text: the decoder, and what the tokens' embeddings are in, each
    with all around it that holds no tower; and the head."""
    names = {id(module): name for name, module in model.named_modules()}
    found = [_outermost(names.get(id(model.get_decoder()), ""), towers)]
    if (embeddings := names.get(id(_embeddings(model)))) is not None:
        found.append(_outermost(embeddings, towers))
    try:
        head = names.get(id(model.get_output_embeddings()))
    except (NotImplementedError, AttributeError):
        head = None
    found += [name for name in names.values() if name.endswith("lm_head")] + heads(model)
    return found + ([head] if head else [])


def within(name: str, outer: str) -> bool:
    """Whether the module `name` is the module `outer` ("": the model), or is inside it."""
    return not outer or f"{name}.".startswith(f"{outer}.")


def _outermost(name: str, others: list[str]) -> str:
    """The outermost module around `name` that does not hold one of the modules `others` as well."""
    pieces = name.split(".")
    around = [".".join(pieces[: i + 1]) for i in range(len(pieces))]
    alone = [n for n in around if not any(within(other, n) for other in others)]
    return alone[0] if alone else name


def task_type(model: nn.Module) -> TaskType | None:
    """SEQ_CLS for a model with a sequence classification head: PEFT leaves heads alone there."""
    names = [cls.__name__ for cls in type(model).__mro__]
    classifier = any(name.endswith("ForSequenceClassification") for name in names)
    return TaskType.SEQ_CLS if classifier else None


def heads(model: nn.Module) -> list[str]:
    """Names of the modules of a classifier that make labels of what the base model gives: those
    that PEFT knows by name; else those beside the base model, or, where it holds all, the linear
    layer that ends in labels. [] of other models."""
    if task_type(model) is None:
        return []
    names = [name for name, _ in model.named_modules()]
    known = [name for name in names if name.endswith(tuple(SEQ_CLS_HEAD_NAMES))]
    if known or not isinstance(model, PreTrainedModel):
        return known
    beside = [
        name
        for name, child in model.named_children()
        if child is not model.base_model and any(True for _ in child.parameters())
    ]
    sizes = {name: linear_shape(module) or (0, 0) for name, module in model.named_modules()}
    ends = [name for name, (_, size) in sizes.items() if size == model.config.num_labels]
    return beside or ends[-1:]


def layer_type(name: str) -> str:
    """A layer's name with * for the number of each block."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
