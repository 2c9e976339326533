"""Before a search: whether the model is a plain one, and which layers no adapter would change.
Not here: which layers match (targets.py), and what PEFT is asked for (adapter.py)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from darts_lora.base.errors import InputError
from darts_lora.lora.adapter import refused
from darts_lora.lora.branches import RankBranches
from darts_lora.lora.cost import usable_ranks
from darts_lora.lora.mixed_linear import linear_shape

READ_PAST = "its weight is read past its forward, so that a LoRA changes nothing"
UNTRAINED = "the model runs it without gradients, so that a LoRA there would never be trained"
NOT_PLAIN = "its forward gives other than one tensor, or of another shape than it says"


def check_plain(model: nn.Module) -> None:
    """The model has no rank branches and no adapters, and is not compiled.

    Raises:
        InputError: it has; the message says what to do.
    """
    for name, module in model.named_modules():
        where = f"model: {name or type(module).__name__}"
        if isinstance(module, RankBranches):
            raise InputError(
                f"{where} is a layer of another Supernet; take that out first by its remove()"
            )
        if isinstance(module, PeftModel | BaseTunerLayer | ModulesToSaveWrapper):
            raise InputError(
                f"{where} has PEFT's adapter; give the base model, as PeftModel.unload() or, with "
                "the adapter's weights added, merge_and_unload() leaves it"
            )
        if isinstance(module, torch._dynamo.OptimizedModule):
            raise InputError(
                f"{where} is compiled; give the model as it was before torch.compile, and compile "
                "it behind Supernet"
            )


def left_out(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    stacked: Collection[str],
    ranks: tuple[int, ...],
) -> dict[str, str]:
    """Name of each layer that no rank is to be searched for -> why, in words.

    Args:
        shapes: of the layers, by name.
        stacked: the names among them that are 3-D parameters, of experts.
        ranks: the candidates.
    """
    found = {}
    for name, shape in shapes.items():
        if usable_ranks(shape, ranks)[-1] == 0:
            found[name] = f"no candidate above 0 is at most {min(shape[-2:])}, its smaller side"
    found |= not_plain_layers(model, [name for name in shapes if name not in stacked])
    left = [name for name in shapes if name not in found]
    return found | {n: f"PEFT: {why}" for n, why in refused(model, left, stacked).items()}


def left_out_lines(reasons: Mapping[str, str]) -> list[str]:
    """One line for each reason, with the first of its layers and how many there are."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    more = {reason: f" and {len(n) - 1} more" if n[1:] else "" for reason, n in groups.items()}
    return [f"left out: {names[0]}{more[why]}: {why}" for why, names in groups.items()]


def not_plain_layers(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Which of these modules a LoRA does not suit -> why: the model reads the weight and does not
    call the forward, or runs it without gradients alone, or the forward gives more than a tensor,
    or one of another shape.

    torch's MultiheadAttention does the former to its out_proj. Of transformers' models a forward of
    a few tokens tells; one that does not take its own `dummy_inputs` tells nothing.
    """
    attention = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    found = dict.fromkeys((f"{name}.out_proj".removeprefix(".") for name in attention), READ_PAST)
    inputs = _few_tokens(model)
    if inputs:
        found |= _watched(model, names, inputs)
    return {name: found[name] for name in names if name in found}


def _few_tokens(model: nn.Module) -> dict[str, Tensor]:
    """transformers' own small input, with no token that the model lacks; {}: none is known."""
    if not isinstance(model, PreTrainedModel) or model.device.type == "meta":
        return {}
    try:
        embedding, inputs = model.get_input_embeddings(), model.dummy_inputs
    except (NotImplementedError, AttributeError):
        return {}
    tokens = getattr(embedding, "num_embeddings", None)
    if tokens is None or not all(isinstance(value, Tensor) for value in inputs.values()):
        return {}
    return {name: v.to(model.device).clamp(max=tokens - 1) for name, v in inputs.items()}


def _watched(model: nn.Module, names: Collection[str], inputs: dict[str, Tensor]) -> dict[str, str]:
    spies = {name: _Spy(model.get_submodule(name)) for name in names}
    training = [module for module in model.modules() if module.training]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        for name, spy in spies.items():
            model.set_submodule(name, spy)
        with torch.enable_grad(), torch.random.fork_rng(devices):
            model.eval()(**inputs)
    except Exception:  # any kind: models that want more than text, or other text
        return {}
    finally:
        for name, spy in spies.items():
            model.set_submodule(name, spy.watched)
        for module in training:
            module.training = True
    past = [name for name, spy in spies.items() if spy.was_read and not spy.was_called]
    other = [name for name, spy in spies.items() if not spy.is_plain]
    idle = [name for name, spy in spies.items() if spy.was_called and not spy.learns]
    found = dict.fromkeys(past, READ_PAST) | dict.fromkeys(idle, UNTRAINED)
    return found | dict.fromkeys(other, NOT_PLAIN)


class _Spy(nn.Module):
    """In the place of a module: whether its weight is read, its forward called, what that gives."""

    def __init__(self, watched: nn.Module):
        super().__init__()
        vars(self).update(watched=watched, was_read=False, was_called=False, is_plain=True)
        vars(self).update(learns=False)

    def forward(self, *args, **kwargs):
        output = self.watched(*args, **kwargs)
        vars(self).update(learns=self.learns or torch.is_grad_enabled())
        plain = isinstance(output, Tensor)
        if plain and args and (shape := linear_shape(self.watched)):
            plain = output.shape == (*args[0].shape[:-1], shape[1])
        vars(self).update(was_called=True, is_plain=plain)
        return output

    def __getattr__(self, name: str):
        if name == "weight":
            vars(self)["was_read"] = True
        return getattr(self.watched, name)
