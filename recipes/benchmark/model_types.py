"""Tries the search and its adapter on a tiny model of every type of the installed transformers.

Each class for causal language modelling, images and text, and sequence classification that can be
built small goes through `try_model`; where a check fails, plain PEFT is tried on the same model.
Not here: how the models are made (tiny_models.py).

    python recipes/benchmark/model_types.py --output runs/model_types.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from tiny_models import inputs, loss, pairs, tiny_model
from torch import Tensor, nn

from darts_lora import Genotype, SearchConfig, Supernet
from darts_lora.base.errors import InputError, one_line
from darts_lora.finetune import FinetuneConfig, add_adapter
from darts_lora.lora.experts import expert_tensors
from darts_lora.lora.mixed_linear import linear_shape
from darts_lora.lora.models import checkpoint_activations
from darts_lora.lora.parts import PARTS, model_parts

RANKS = (0, 1, 2, 4)
TOLERANCE = 1e-4  # of the largest logit


@dataclass
class Record:
    """What came of one model."""

    task: str
    kind: str
    result: str = "right"
    """right, or what failed: not built, refused, or the name of a check."""
    error: str | None = None
    plain_peft: str | None = None
    """Where a check failed: how plain PEFT fares on the model, "works" or its error."""
    layers: int = 0
    experts: int = 0
    """Searched layers, and those of them that are 3-D parameters of experts."""
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def try_model(task: str, kind: str) -> Record:
    """All checks on one model; the first that fails ends them."""
    record, begun = Record(task, kind), time.perf_counter()
    try:
        model = tiny_model(task, kind)
    except Exception as error:  # of any kind: sizes that do not go together, packages
        record.result, record.error = "not built", one_line(error)
        return record
    step = "supernet"
    try:
        for step in _checks(model, record):  # noqa: B007 - the name of the check under way
            pass
    except InputError as error:
        record.result, record.error = "refused", str(error)
    except Exception as error:  # of any kind: it is what is counted
        record.result, record.error = step, one_line(error)
    if record.error is not None:
        record.plain_peft = plain_peft(task, kind)
    record.seconds = round(time.perf_counter() - begun, 2)
    return record


def _checks(model: nn.Module, record: Record):
    """Gives the name of each check before it is made."""
    batch = inputs(model, record.task)
    base = outputs(model, batch)
    yield "supernet"
    supernet = Supernet(model, search_config(model))
    record.layers, record.left_out = len(supernet.layers), supernet.left_out
    record.experts = sum(len(layer.shape) == 3 for layer in supernet.layers.values())
    yield "start"
    require(torch.equal(outputs(model, batch), base), "the output at the start is not the base's")
    yield "gradients"
    randomise(supernet)
    gradients = backward(supernet, batch)
    yield "checkpointing"
    if getattr(model, "supports_gradient_checkpointing", False):
        checkpoint_activations(model.train(), use_reentrant=False)
        for name, gradient in backward(supernet, batch).items():
            require(close(gradient, gradients[name]), f"{name}: another gradient")
        model.eval().gradient_checkpointing_disable()
    yield "choice"
    genotype = choose(supernet)
    with supernet.in_directions(), supernet.probing(lambda rows: chosen_gates(supernet, genotype)):
        wanted = outputs(model, batch)
    state = genotype.inherited_state(supernet)
    yield "remove"
    require(torch.equal(outputs(supernet.remove(), batch), base), "the base is not what it was")
    yield "parts"
    check_parts(model)
    yield "adapter"  # whose ranks and trained parameters add_adapter compares
    adapted = add_adapter(model, FinetuneConfig(genotype="-"), genotype)
    loaded = set_peft_model_state_dict(adapted, state)
    missing = [key for key in loaded.missing_keys if "lora_" in key]
    require(not missing and not loaded.unexpected_keys, f"not loaded: {missing[:1]}")
    require(close(outputs(adapted, batch), wanted), "the adapter is not the searched one")
    yield "reach"
    check_reach(adapted, batch, genotype, gradients)
    yield "reload"
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        again = PeftModel.from_pretrained(tiny_model(record.task, record.kind), folder)
    require(close(outputs(again, batch), wanted), "the adapter is another one when it is loaded")


def search_config(model: nn.Module) -> SearchConfig:
    """All linear layers, and experts where there are any."""
    experts = "all-experts" if expert_tensors(model) else None
    return SearchConfig(ranks=RANKS, target_parameters=experts)


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits, with the same random numbers: some models draw theirs also in evaluation."""
    torch.manual_seed(0)
    return model(**batch).logits


def randomise(supernet: Supernet) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in supernet.layers.values():
            used = layer.membership.any(1)
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator) * used)


def backward(supernet: Supernet, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a pass of the weights and one of gates: `<layer>.A`, `.B` and `.gates`."""
    torch.manual_seed(0)
    for parameter in supernet.weight_parameters():
        parameter.grad = None
    value = loss(supernet.model, batch)
    if value.requires_grad:  # else nothing that is trained is behind it, in PEFT neither
        value.backward()
    torch.manual_seed(0)
    gates = supernet.mean_gates().clone().requires_grad_()
    of_gates = torch.zeros_like(gates)
    with supernet.probing(lambda rows: gates):
        value = loss(supernet.model, batch)
        if value.requires_grad:
            of_gates = torch.autograd.grad(value, gates, allow_unused=True)[0]
            of_gates = torch.zeros_like(gates) if of_gates is None else of_gates
    found = {}
    for i, (name, layer) in enumerate(supernet.layers.items()):
        for part, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
            grad = parameter.grad
            found[f"{name}.{part}"] = torch.zeros_like(parameter) if grad is None else grad
        found[f"{name}.gates"] = of_gates[i]
    return found


def choose(supernet: Supernet) -> Genotype:
    """One rank for each layer, in turns, and alpha that gives all weight to it."""
    chosen = (1 + torch.arange(len(supernet.layers))) % len(RANKS)
    with torch.no_grad():
        supernet.alpha.copy_(200.0 * nn.functional.one_hot(chosen, len(RANKS)))
    return Genotype.from_supernet(supernet)


def chosen_gates(supernet: Supernet, genotype: Genotype) -> Tensor:
    """Of a supernet in its directions: each layer has the first ones, as many as its rank."""
    ranks = torch.tensor([genotype.ranks[name] for name in supernet.layers])
    columns = torch.arange(supernet.mean_gates().shape[1])
    return supernet.config.scaling * (columns < ranks[:, None]).float()


def check_reach(adapted, batch, genotype: Genotype, gradients: dict[str, Tensor]) -> None:
    """Each layer that PEFT's adapter gives a gradient got one of A, B and gates in the supernet."""
    value = loss(adapted, batch)
    if value.requires_grad:
        value.backward()
    for key, parameter in adapted.named_parameters():
        if ".lora_B." not in key or parameter.grad is None or not parameter.grad.any():
            continue
        name = re.sub(r"(\.base_layer)*\.lora_B\..*", "", key).removeprefix("base_model.model.")
        for layer in [n for n in genotype.ranks if n == name or n.rpartition(".")[0] == name]:
            for part in ("A", "B", "gates") if genotype.ranks[layer] else ():
                require(gradients[f"{layer}.{part}"].any(), f"{layer}: no gradient of {part}")


def check_parts(model: nn.Module) -> None:
    """Each linear layer is in one part; the image encoder's are not in the language's."""
    parts = model_parts(model)
    encoder = model.get_encoder(modality="image") or model
    if "text" in getattr(encoder, "input_modalities", ()):  # T5Gemma 2's has text beside
        encoder = model
    for name, module in model.named_modules():
        if linear_shape(module):
            require(parts.get(name) in PARTS, f"{name} is in no part of the model")
            inside = encoder is not model and module in set(encoder.modules())
            require(not inside or parts[name] != "language", f"{name} is of the image encoder")


def plain_peft(task: str, kind: str) -> str:
    """Whether PEFT's own all-linear trains and reloads on the model: "works", or its error."""
    try:
        model = tiny_model(task, kind)
        batch = inputs(model, task)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(model, config)
        loss(adapted, batch).backward()
        wanted = outputs(adapted, batch)
        if getattr(model, "supports_gradient_checkpointing", False):
            checkpoint_activations(model.train(), use_reentrant=False)
            loss(adapted, batch).backward()
        with tempfile.TemporaryDirectory() as folder:
            adapted.save_pretrained(folder)
            again = PeftModel.from_pretrained(tiny_model(task, kind), folder)
        require(close(outputs(again, batch), wanted), "another adapter when it is loaded")
    except Exception as error:  # of any kind: it is what is counted
        return one_line(error)
    return "works"


def close(one: Tensor, other: Tensor) -> bool:
    scale = max(1.0, float(other.abs().max()))
    return bool((one - other).abs().max() <= TOLERANCE * scale)


def require(ok: Any, message: str) -> None:
    if not ok:
        raise AssertionError(message)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default="runs/model_types.jsonl", help="JSON, a line a model")
    parser.add_argument("--types", nargs="*", help="model types; default: all")
    options = parser.parse_args()
    os.makedirs(os.path.dirname(options.output) or ".", exist_ok=True)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    records = []
    with open(options.output, "w", encoding="utf-8") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for task, kind in pairs():
            if options.types and kind not in options.types:
                continue
            records.append(try_model(task, kind))
            file.write(json.dumps(vars(records[-1])) + "\n")
            file.flush()
    show(records)


def show(records: list[Record]) -> None:
    """How many models went how, and the failures by name."""
    built = [record for record in records if record.result != "not built"]
    print(f"{len(records)} models; built: {len(built)} of {len({r.kind for r in built})} types")
    for result, count in Counter(record.result for record in built).most_common():
        print(f"{result}: {count}")
    for record in built:
        if record.result != "right":
            peft = "" if record.plain_peft == "works" else f"; plain PEFT: {record.plain_peft}"
            print(f"  {record.task} {record.kind}: {record.result}: {record.error}{peft}")


if __name__ == "__main__":
    main()
