"""Base models and their processors, by transformers' Auto classes; the embedded default's folder.
Not here: adapters and search layers (supernet.py, finetune.py), nor what a batch looks like."""

from __future__ import annotations

import hashlib
import os
import shlex
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TorchAoConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from darts_lora.base.errors import InputError, one_line
from darts_lora.base.interruption import lacks_memory
from darts_lora.config import ModelConfig
from darts_lora.lora.causality import check_causal, check_decoder
from darts_lora.lora.parts import heads

EMBEDDED = Path(__file__).parents[1] / "data" / "embedded"
# What a message of a missing package says -> the extra of this package that brings it.
EXTRAS = {
    "torchvision": "vision",
    "num2words": "vision",
    "bitsandbytes": "quantization",
    "torchao": "quantization",
    "gguf": "smollm2",
}


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The base model with its weights, in evaluation mode; on the CPU, or, quantized, on the device
    of this process. A classifier's `fresh_modules` names the modules that the checkpoint has no
    weights for.

    Raises:
        InputError: the model is not there, its files cannot be loaded, or it is to generate and
            attends to later tokens.
    """
    options: dict[str, Any] = {"dtype": config.dtype, "output_loading_info": True}
    if config.gguf_file is not None:
        options["gguf_file"] = config.gguf_file
    model_config = load_model_config(config)
    classifier = is_classifier(model_config, config.task)
    if config.quantization is not None:
        with _explained(config):
            whole = _heads_of(model_config) if classifier else None
            options["quantization_config"] = _quantization(config, model_config, whole)
        options["device_map"] = {"": PartialState().device}
    if config.num_labels is not None:
        options["ignore_mismatched_sizes"] = True
    loader = auto_class(model_config, config.task)
    model, info = _load(loader, config, config=model_config, **options)
    if getattr(model, "_hf_peft_config_loaded", False):  # of the hub: no folder was looked at
        raise InputError(
            f"model_name_or_path={config.model_name_or_path!r}: brings an adapter, which was "
            "loaded into the model; name the base model, or merge the adapter into it"
        )
    if config.num_labels is not None:
        _check_head(config, model, [key for key, *_ in info["mismatched_keys"]])
    if not classifier:
        _check_whole(config, model, info["missing_keys"])
    if classifier:
        model.fresh_modules = _fresh_modules(config, model, info["missing_keys"])
        # models that take a decoder's last token find it by this
        tokenizer = _tokenizer(load_processor(config))
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    for module in model.modules():
        # With it, bitsandbytes packs 4-bit weights anew at the first evaluation on some CPUs, and
        # no gradient passes them from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if config.gguf_file is not None:  # unpacked, but trainers would take it for quantized
        model.is_quantized = False
        for owner, mark in ((model, "hf_quantizer"), (model.config, "quantization_config")):
            if hasattr(owner, mark):
                delattr(owner, mark)
    if not classifier:
        check_causal(model, config.model_name_or_path)
    if config.gradient_checkpointing:
        # The re-entrant kind gives no gradients where, as here, the model's input needs none.
        if not model.supports_gradient_checkpointing:
            raise InputError(
                f"gradient_checkpointing=true: {type(model).__name__} has none; leave it out"
            )
        checkpoint_activations(model, use_reentrant=False)
        model.config.get_text_config().use_cache = False
    return model


def weight_samples(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Each parameter with a few of its elements as they are now: enough to tell another checkpoint,
    and a change of all elements, without reading all of them."""
    plain = (p for p in model.parameters() if type(p.data) is Tensor)  # torchao has its own
    return [(p, sample_of(p)) for p in plain]


def sample_of(weight: Tensor, most: int = 256) -> Tensor:
    """At most about `most` elements of a tensor, evenly spaced; a copy, on the CPU."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // most)].to("cpu", copy=True)


def frozen_digest(model: nn.Module) -> str:
    """Of samples of all parameters that are not trained: names a checkpoint, whatever its path."""
    digest = hashlib.blake2b(digest_size=8)
    for weight, sample in weight_samples(model):
        if not weight.requires_grad:
            digest.update(repr((tuple(weight.shape), weight.dtype)).encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_digest(state: dict[str, Tensor]) -> str:
    """Names a supernet's state by its names, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        digest.update(repr((name, tuple(value.shape), value.dtype)).encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checkpoint_activations(model: PreTrainedModel, **options) -> None:
    """Gradient checkpointing, by the name that this release of transformers has for it.

    Args:
        options: of torch.utils.checkpoint.checkpoint.
    """
    current = getattr(model, "activation_checkpointing_enable", None)
    (current or model.gradient_checkpointing_enable)(options)


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    """transformers' configuration of the model; reads no weights.

    Raises:
        InputError: the model is not there, its configuration cannot be read, num_labels is given
            for what is no classifier, or a model that is to generate has an encoder.
    """
    options: dict[str, Any] = {} if config.num_labels is None else {"num_labels": config.num_labels}
    if config.gguf_file is not None:
        options["gguf_file"] = config.gguf_file
    _refuse_adapter(config)
    found = _load(AutoConfig, config, **options)
    if config.num_labels is not None and not is_classifier(found, config.task):
        raise InputError(
            f"num_labels={config.num_labels}: with task={config.task!r} this model generates text "
            "and has no classes; use task=classification, or leave num_labels out"
        )
    if not is_classifier(found, config.task):
        check_decoder(found, config.model_name_or_path)
    return found


def _refuse_adapter(config: ModelConfig) -> None:
    """InputError for a folder with an adapter in it: transformers would follow it to another base
    model, or load it into this one, without a word."""
    if os.path.isfile(os.path.join(_source(config), "adapter_config.json")):
        raise InputError(
            f"model_name_or_path={config.model_name_or_path!r}: holds an adapter "
            "(adapter_config.json), which would be loaded into the model; name the base model, or "
            "merge the adapter into it"
        )


def auto_class(config: PretrainedConfig, task: str = "auto") -> type:
    """The Auto class that builds a model of this configuration."""
    if is_classifier(config, task):
        return AutoModelForSequenceClassification
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def is_classifier(config: PretrainedConfig, task: str = "auto") -> bool:
    """Whether the task is to classify rows; "auto": whether the checkpoint has a head for it."""
    if task == "auto":
        classifiers = set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
        return bool(classifiers & set(config.architectures or ()))
    return task == "classification"


def context_length(config: PretrainedConfig) -> int | None:
    """Longest sequence that the model's positions allow (tokens), None where it does not say."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if longest is None or longest > 0 else None  # XLNet's -1: any length


def load_processor(config: ModelConfig) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The model's processor; the tokenizer alone where the model takes text only.

    Raises:
        InputError: it is not there, or cannot be loaded.
    """
    if config.gguf_file is not None:
        processor = _load(AutoTokenizer, config, gguf_file=config.gguf_file)
    else:
        processor = _load(AutoProcessor, config)
    tokenizer = _tokenizer(processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # labels mask padding by position, not by token
    return processor


def _tokenizer(processor: Any) -> PreTrainedTokenizerBase:
    return getattr(processor, "tokenizer", processor)


def _check_whole(config: ModelConfig, model: PreTrainedModel, missing: set[str]) -> None:
    """What generates text has all of its weights: others would be drawn at random at each load."""
    names = [name for name, _ in model.named_parameters() if name in missing]
    if names:
        count = sum(1 for _ in model.parameters())
        raise InputError(
            f"model_name_or_path={config.model_name_or_path!r}: the checkpoint has no weights for "
            f"{len(names)} of {count} tensors of {type(model).__name__}, first {names[0]}; name "
            "one that was saved as this class, or, to classify, use task=classification"
        )


def _check_head(config: ModelConfig, model: PreTrainedModel, mismatched: list[str]) -> None:
    """Another number of labels makes a new head, and nothing else new."""
    head = tuple(f"{name}." for name in heads(model))
    other = [key for key in mismatched if not key.startswith(head)]
    if other:
        raise InputError(
            f"model_name_or_path={config.model_name_or_path!r}: cannot be loaded (the shape of "
            f"{other[0]} is not that of the configuration); num_labels={config.num_labels} makes a "
            "new head alone"
        )


def _fresh_modules(config: ModelConfig, model: PreTrainedModel, missing: set[str]) -> list[str]:
    """The modules of weights that the checkpoint lacks. They were drawn at random, and are again at
    the next load: whoever trains the model must train and save them as well."""
    weights = [name for name, _ in model.named_parameters() if name in missing]
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in weights))
    for name in names:
        module = model.get_submodule(name)
        # bitsandbytes leaves such weights whole, but in a layer that cannot compute with them
        if config.quantization and isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            raise InputError(
                f"quantization={config.quantization!r}: the checkpoint "
                f"{config.model_name_or_path!r} has no weights for {name}; leave quantization out, "
                "or save the model once by AutoModelForSequenceClassification and name that folder"
            )
    return names


def _heads_of(config: PretrainedConfig) -> list[str]:
    """Names of the head's modules of a classifier, of which nothing is loaded."""
    with torch.device("meta"):
        return heads(AutoModelForSequenceClassification.from_config(config))


def _quantization(
    config: ModelConfig, model_config: PretrainedConfig, whole: list[str] | None
) -> BitsAndBytesConfig | TorchAoConfig:
    """Weights of the base in 4 bits (QLoRA, arXiv 2305.14314), computed with in the dtype of what
    stays whole, or in 8 bits; the modules in `whole`, a head that is trained, stay as they are."""
    if config.quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=whole)
    stored = getattr(model_config, "dtype", None) or model_config.get_text_config().dtype
    compute = stored if config.dtype == "auto" else getattr(torch, config.dtype)
    return BitsAndBytesConfig(
        load_in_8bit=config.quantization == "8bit",
        load_in_4bit=config.quantization == "4bit",
        llm_int8_skip_modules=whole,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute or torch.float32,
    )


def _load(loader: Any, model: ModelConfig, /, **options):
    with _explained(model):
        trusted = model.trust_remote_code
        return loader.from_pretrained(_source(model), trust_remote_code=trusted, **options)


def _source(model: ModelConfig) -> str:
    name = model.model_name_or_path
    return str(EMBEDDED / "model") if name == "embedded" else name


@contextmanager
def _explained(model: ModelConfig):
    """What transformers raises as an InputError that says what to do."""
    name, source = model.model_name_or_path, _source(model)
    try:
        yield
    except Exception as error:  # any kind: damaged files, sizes that are none, missing packages
        if lacks_memory(error):
            raise
        reason = one_line(error, 500)
        named = EXTRAS.items() if isinstance(error, ImportError) else ()
        extras = {extra for package, extra in named if package in reason.lower()}
        if extras:
            advice = " and ".join(f'pip install "darts_lora[{extra}]"' for extra in sorted(extras))
        elif files := _gguf_files(source) if model.gguf_file is None else []:
            advice = f"the folder has GGUF files: give --gguf_file {shlex.quote(files[0])}"
        else:
            advice = "give a hub name, a folder written by save_pretrained, or embedded"
        local = os.path.isdir(source) or extras
        kind = "cannot be loaded" if local else "no local folder, no model of the hub"
        raise InputError(f"model_name_or_path={name!r}: {kind} ({reason}); {advice}") from error


def _gguf_files(folder: str) -> list[str]:
    """GGUF files of a folder; of one that is such a file itself, its name."""
    names = os.listdir(folder) if os.path.isdir(folder) else [os.path.basename(folder)]
    return sorted(name for name in names if name.lower().endswith(".gguf"))
