"""Tiny random models of all model types of the installed transformers, built from their own
configurations by making every size small. Not here: what is tried on them (model_types.py)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TASKS = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "image-text": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    "classification": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
}
VOCABULARY, LENGTH = 96, 8
# What an integer of a configuration is made, by the first pattern that its name matches.
SIZES = [
    (r"num_kv_shared_layers|hidden_size_per_layer_input", 0),
    (r"index_topk", 16),
    (r"index_kpool", 4),
    (r"adapter_in_dim|adapter_input_size|codebook_dim", 32),
    (r"mamba_(d_head|head_?dim)", 32),
    (r"d_head", 16),
    (r"mamba_d_ssm", 64),
    (r"coordinate_size", 4),
    (r"shape_size", 8),
    (r"vocab_size|n_vocab|.*vocabulary_size|.*_vocab_size", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|.*max_position.*|max_2d.*", 64),
    (r"(num|n)_.*(groups?|group)|.*n_group|topk_group|.*num_groups", 1),
    (r".*(num_key_value_heads|kv_heads|n_head_kv|num_kv_heads|kv_n_heads)", 2),
    (r".*(experts_per_tok|top_k|topk|num_selected_experts|router_top_k).*|moe_k", 2),
    (r".*shared_experts?|n_shared.*", 1),
    (r".*(num|n)_.*experts.*|.*num_experts.*|.*experts_num", 4),
    (r".*shared_expert_intermediate_size", 32),
    (r"first_k_dense_replace|moe_layer_start_index|.*dense_layers?", 1),
    (r".*heads?|.*attention_head_count|.*n_head", 2),
    (r"decoder_layers|encoder_layers|.*num_layers|.*hidden_layers|n_layers?|depth|.*_depth", 2),
    (r".*layers", 2),
    (r"(qk_)?nope_head_dim|qk_nope_head_dim|qk_rope_head_dim|v_head_dim", 8),
    (r".*lora_rank|.*_rank|dt_rank", 8),
    (r"attn_layer_offset", 1),
    (r"attn_layer_period", 2),
    (r".*head_dim|d_kv|attention_head_size|kv_channels|.*head_size|d_head", 16),
    (r"image_size|input_size", 32),
    (r".*patch_size|patch_.*", 8),
    (r"num_channels|in_channels|in_chans", 3),
    (r".*(intermediate|ffn|mlp|inner|feed_forward|d_ff).*(size|dim|hidden)?", 64),
    (r".*(hidden|embed|d_model|n_embd|model_dim|width|proj).*(size|dim|dims)?|dim|d_model", 32),
    (r"state_size|.*d_state|ssm_state.*|conv_kernel|.*d_conv", 4),
    (r"chunk_size|.*window.*|attention_window|block_size", 8),
]
COMPILED = [(re.compile(pattern), size) for pattern, size in SIZES]
IDS = re.compile(r".*_token_(id|index)|.*token_id|.*_index|.*_id$")
# What some types need, though None stands there.
NEEDED = re.compile(
    r"num_key_value_heads|head_dim|num_experts_per_tok|n_routed_experts|n_shared_experts|vocab_size"
)
# Widths and sections of rotary embeddings that are tried one after the other.
TRIED = ((32, None), (64, None), (128, None), (32, [2, 3, 3]), (32, [1, 1, 2]), (64, [4, 2, 2]))
FIXED = ("image_size", "input_size", "mamba_d_head", "mamba_head_dim", "mamba_headdim")
KEPT = re.compile(
    r"num_channels|.*num_labels|type_vocab_size|.*scale.*|.*eps|.*rope.*factor|.*ratio"
)


def pairs() -> Iterator[tuple[str, str]]:
    """(task, model type) of everything that the Auto classes know, in order."""
    for task, (_, mapping) in TASKS.items():
        for kind in getattr(modeling_auto, mapping):
            yield task, kind


def tiny_config(kind: str, hidden: int, sections: list[int] | None) -> PretrainedConfig:
    """The type's own configuration, with small sizes everywhere.

    Args:
        hidden: the model's width.
        sections: how rotary embeddings share a head among time, height and width; None: the
            type's own.
    """
    config_class = CONFIG_MAPPING[kind]
    return config_class(**_small(config_class(), hidden, sections))


def _small(config: PretrainedConfig, hidden: int, sections: list[int] | None) -> dict[str, Any]:
    small: dict[str, Any] = {}
    attributes = {**config.to_dict(), **vars(config)}
    for name, value in attributes.items():
        if isinstance(value, PretrainedConfig):
            small[name] = type(value)(**_small(value, hidden, sections))
        elif isinstance(value, bool) or name.startswith("_") or KEPT.fullmatch(name):
            continue
        elif isinstance(value, float) and "drop" in name:
            small[name] = 0.0
        elif isinstance(value, int) or (value is None and NEEDED.fullmatch(name)):
            size = _size(name, value)
            if size is not None:
                small[name] = hidden if size == 32 and name not in FIXED else size
        elif name == "layer_types" and value is None:
            small[name] = ["full_attention"] * 2
        elif isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            kinds = list(dict.fromkeys(value))
            small[name] = (kinds[:1] + kinds[-1:]) if len(value) > 1 else value
        elif isinstance(value, dict) and ("mrope_section" in value or "rope_type" in value):
            small[name] = {**value, "mrope_section": sections} if sections else value
    if "qk_rope_head_dim" in attributes and "head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]
    if "expand" in attributes and "head_dim" in small:  # Mamba 2
        small["head_dim"] = hidden * attributes["expand"] // 2
    if attributes.get("pad_token_id") is None:
        small["pad_token_id"] = 0
    if config.is_encoder_decoder and not attributes.get("decoder_start_token_id"):
        small["decoder_start_token_id"] = 0
    if "axial_pos_embds" in attributes:  # Reformer's, whose sizes are tuples
        small["axial_pos_embds"] = False
    if attributes.get("languages"):
        small["default_language"] = attributes["languages"][0]
    small.pop("model_type", None)
    known = (
        set(vars(config)) | set(config.attribute_map) | {"pad_token_id", "decoder_start_token_id"}
    )
    return {name: value for name, value in small.items() if name in known}


def _size(name: str, value: int | None) -> int | None:
    if IDS.fullmatch(name):
        return min(value, VOCABULARY - 1) if value and value > 0 else None
    for pattern, size in COMPILED:
        if pattern.fullmatch(name):
            return size if value is None else min(size, value) if value > 0 else None
    return None


def tiny_model(task: str, kind: str) -> PreTrainedModel:
    """A model of this type with random weights, large enough to tell layers apart."""
    auto = getattr(transformers, TASKS[task][0])
    errors = []
    for hidden, sections in TRIED:
        try:
            torch.manual_seed(0)
            config = tiny_config(kind, hidden, sections)
            config._attn_implementation = "eager"
            config.get_text_config().use_cache = False
            if task == "causal" and hasattr(config, "is_decoder"):
                config.is_decoder = True
            model = auto.from_config(config).float().eval()
            with torch.no_grad():
                loss(model, inputs(model, task))
            return model
        except Exception as error:  # of any kind: sizes that do not go together
            errors.append(error)
    raise errors[0]


def inputs(model: PreTrainedModel, task: str) -> dict[str, Tensor]:
    """Two rows of text, of which each has an image where the model takes images."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 60, (2, LENGTH), generator=generator)
    batch = {"input_ids": ids}
    if task == "image-text":
        batch |= _with_images(model, ids, generator)
    ids = batch["input_ids"]
    if "bbox" in inspect.signature(model.forward).parameters:
        batch["bbox"] = torch.zeros(*ids.shape, 4, dtype=torch.long)
    batch["labels"] = torch.tensor([0, 1]) if task == "classification" else ids
    if task == "classification":  # encoder-decoders classify by the state at the end
        end = getattr(model.config.get_text_config(), "eos_token_id", None)
        if isinstance(end, int):
            ids[:, -1] = end
    return {**batch, "attention_mask": torch.ones_like(ids)}


def _with_images(model: PreTrainedModel, ids: Tensor, generator) -> dict[str, Tensor]:
    """What of text with the tokens of one image, or without them, the model takes together with
    pixels; {}: neither."""
    config = model.config
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", config)
    size = getattr(vision, "image_size", None)
    size = size[0] if isinstance(size, list | tuple) else size or 32
    pixels = torch.randn(2, getattr(vision, "num_channels", 3), size, size, generator=generator)
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if token is None:
        token = config.image_token_id = config.image_token_index = VOCABULARY - 1
    for wanted in (True, False):
        try:
            batch = {"input_ids": ids, "pixel_values": pixels}
            with torch.no_grad():
                if wanted:
                    features = model.get_image_features(pixel_values=pixels)
                    features = getattr(features, "pooler_output", features)
                    count = sum(each.shape[:-1].numel() for each in features) // 2
                    batch["input_ids"] = torch.cat([ids, torch.full((2, count), token)], 1)
                if "qformer_input_ids" in inspect.signature(model.forward).parameters:
                    batch["qformer_input_ids"] = ids
                model(**batch)
            return batch
        except Exception:  # of any kind: other inputs, other tokens
            continue
    return {}


def loss(model, batch: dict[str, Tensor]) -> Tensor:
    found = model(**batch).loss
    if not torch.isfinite(found):
        raise ValueError(f"the loss is {found}")
    return found
