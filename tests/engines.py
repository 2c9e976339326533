"""How engines that serve read a PEFT adapter's folder: what each adds to which weight. Rewritten
from what their loaders do, for a model of one stack of decoder layers. Not here: the tests."""

import json
import os
import re
from collections import Counter, defaultdict

import torch
from safetensors.torch import load_file
from torch import nn

from darts_lora.lora.parts import layer_type


class RefusedError(Exception):
    """The engine does not load the adapter."""


def _read(folder):
    with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
        config = json.load(file)
    layers = defaultdict(dict)
    for key, value in load_file(os.path.join(folder, "adapter_model.safetensors")).items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if found is None:
            raise RefusedError(f"{key} is no A or B")
        layers[found[1]][found[2]] = value
    return config, layers


def _one_scale(config):
    return config["lora_alpha"] / (config["r"] ** (0.5 if config["use_rslora"] else 1))


def _refuse_variants(config):
    unknown = ("pissa", "olora", "corda", "loftq", "lora_ga")
    if config["use_dora"] or str(config["init_lora_weights"]).startswith(unknown):
        raise RefusedError("a variant")


def vllm_without_patterns(folder, base):
    """Older vLLM: one scale; A and B are copied into zeroed buffers, each at its own shape."""
    config, layers = _read(folder)
    _refuse_variants(config)
    if max(len(layer["A"]) for layer in layers.values()) > config["r"]:
        raise RefusedError("above max_lora_rank")
    return {n: _one_scale(config) * layer["B"] @ layer["A"] for n, layer in layers.items()}


def vllm(folder, base):
    """Newer vLLM: rank and alpha of the first pattern that a name matches, or those for all."""
    config, layers = _read(folder)
    _refuse_variants(config)

    def of(pattern, name, default):
        hits = (v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", name))
        return next(hits, default)

    changes = {}
    for name, layer in layers.items():
        rank = of(config["rank_pattern"], name, config["r"])
        alpha = of(config["alpha_pattern"], name, config["lora_alpha"])
        scale = alpha / (rank ** (0.5 if config["use_rslora"] else 1))
        changes[name] = scale * layer["B"] @ layer["A"]
    return changes


def sglang(folder, base):
    """No pattern may change a value; targets are a list, and what is not in it is not loaded."""
    config, layers = _read(folder)
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if any(value != config[default] for value in config[pattern].values()):
            raise RefusedError(pattern)
    targets = config["target_modules"]
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        raise RefusedError("target_modules is a string")
    leaves = {target.rpartition(".")[2] for target in targets}
    changes = {}
    for name, layer in layers.items():
        if name.rpartition(".")[2] not in leaves:
            continue
        if len(layer["A"]) != config["r"]:
            raise RefusedError("another rank than its buffer's")
        changes[name] = _one_scale(config) * layer["B"] @ layer["A"]
    return changes


def llama_cpp(folder, base):
    """One alpha, over the rank of each tensor; nothing else of the configuration is read."""
    config, layers = _read(folder)
    alpha = config["lora_alpha"]
    return {
        n: (alpha / len(lay["A"]) if alpha else 1.0) * lay["B"] @ lay["A"]
        for n, lay in layers.items()
    }


def tgi(folder, base):
    """TGI and LoRAX: one scale; the A and B of a type are stacked over all of its layers, and a
    type of which one layer has none is dropped."""
    config, layers = _read(folder)
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    there, all_of = (Counter(map(layer_type, names)) for names in (layers, linear))
    changes = {}
    for kind, count in there.items():
        if count < all_of[kind]:
            continue
        own = {name: layer for name, layer in layers.items() if layer_type(name) == kind}
        try:
            a, b = (torch.stack([layer[part] for layer in own.values()]) for part in "AB")
        except RuntimeError as error:
            raise RefusedError("ranks that differ cannot be stacked") from error
        changes |= dict(zip(own, _one_scale(config) * b @ a, strict=True))
    return changes


ENGINES = (vllm_without_patterns, vllm, sglang, llama_cpp, tgi)


@torch.no_grad()
def served(engine, folder, base):
    """`base`, changed in place as this engine would serve it with the adapter."""
    for name, change in engine(folder, base).items():
        base.get_submodule(name).weight += change
    return base
