"""LoRA's variants on found ranks, by PEFT's own options: rsLoRA, DoRA, first weights. What cannot
go with found ranks or with the handover is refused by name.
Not here: who asks for them (beginning.py), LoRA+'s rates (callbacks.py)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor

from darts_lora.base.errors import InputError, one_line
from darts_lora.lora.mixed_linear import linear_shape
from darts_lora.lora.padded import check_servable

INITS = ("gaussian", "pissa", "eva")
REFUSED = {
    "pissa_niter": "takes a random part out of the base, and a reload another; use pissa",
    "olora": "is no better tried than pissa here; use that",
    "orthogonal": "is for even ranks alone, and found ranks are odd too",
    "lora_ga": "takes a part out of the base that no reload can compute again",
    "corda": "takes a part out of the base that no reload can compute again",
    "loftq": "quantizes the base by itself; use quantization",
    "mica": "holds B still, of which half of a budget is",
}
EVA_BATCHES, EVA_PASSES = 32, 500


def check_variants(
    init: str | None, init_lora_weights: str | None, use_dora: bool, pad_to_max: bool
) -> None:
    """Which options of a finetune go together.

    Args:
        init: scratch or inherit; None: not said.
        init_lora_weights: PEFT's; None: its default.

    Raises:
        InputError: these do not.
    """
    if init_lora_weights is not None and init_lora_weights not in INITS:
        reasons = (why for name, why in REFUSED.items() if init_lora_weights.startswith(name))
        reason = next(reasons, "is none that is known")
        raise InputError(
            f"init_lora_weights={init_lora_weights!r}: {reason}; one of {', '.join(INITS)}"
        )
    if init_lora_weights is not None and init == "inherit":
        raise InputError(
            f"init_lora_weights={init_lora_weights!r}, init='inherit': both say where A and B "
            "begin; give one of them (init=scratch trains for all of max_steps)"
        )
    if pad_to_max:
        check_servable(init_lora_weights, use_dora, None)


def check_quantized(
    init_lora_weights: str | None, use_dora: bool, quantization: str | None
) -> None:
    """Whether a variant can begin on quantized weights.

    Raises:
        InputError: it cannot.
    """
    if quantization is not None and init_lora_weights == "pissa":
        raise InputError(
            f"init_lora_weights='pissa', quantization={quantization!r}: PiSSA takes a part out of "
            "whole weights; leave one of them out"
        )
    if quantization == "8bit" and use_dora:  # seen on a CPU, with PEFT 0.21 and bitsandbytes 0.50
        raise InputError(
            "use_dora=true, quantization='8bit': where PEFT reads the norms of such weights they "
            "lose their scales; use 4bit or int8"
        )


def variant_options(
    use_rslora: bool, use_dora: bool, init_lora_weights: str | None, stacked: list[str]
) -> dict[str, Any]:
    """The LoraConfig fields of a variant.

    Args:
        stacked: names of 3-D parameters of experts among the layers.

    Raises:
        InputError: PEFT has no such variant for experts.
    """
    wanted = {"use_dora=true": use_dora, "init_lora_weights": init_lora_weights}
    for name, value in wanted.items():
        if value and stacked:
            raise InputError(f"{name}: PEFT has it for linear layers alone, not for {stacked[0]}")
    options: dict[str, Any] = {"use_rslora": True} if use_rslora else {}
    if use_dora:
        options["use_dora"] = True
    if init_lora_weights:
        options["init_lora_weights"] = init_lora_weights
    if init_lora_weights == "eva":  # without shares: the ranks are found already
        options["eva_config"] = EvaConfig(rho=1.0, use_label_mask=False)
    return options


@torch.no_grad()
def keep_function(model: PeftModel, scaling: float) -> None:
    """After A and B were set whose change is `scaling` B A: each layer's own scaling enters B, and
    DoRA's magnitudes become the norms of the changed weights, so that the model computes that."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        (name,) = layer.lora_B
        a, b, own = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        b.mul_(scaling / own)
        if name in layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[name].update_layer(
                base_layer=layer.get_base_layer(), lora_A=a, lora_B=b, scaling=own
            )


def eva_weights(
    model: PeftModel, rows: Iterable[dict], collate: Callable[[list], dict], batch_size: int
) -> None:
    """EVA's A (the directions in which a layer's inputs vary most), at the ranks that are there.

    Args:
        rows: training rows, of which the first are used; collate: makes a batch of them.

    Raises:
        InputError: the directions do not settle, or a layer has no inputs.
    """
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    largest = max(len(layer.lora_A["default"].weight) for layer in layers.values())
    # of each layer as many as all have: layers with the same input share theirs, whatever its rank
    widths = {name: linear_shape(layer.get_base_layer())[0] for name, layer in layers.items()}
    narrow = {re.escape(n): width for n, width in widths.items() if width < largest}
    config = LoraConfig(
        r=largest, rank_pattern=narrow, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)
    )
    if not getattr(model.get_base_model(), "is_quantized", False):  # else it is there already
        model.to(PartialState().device)
    first = list(islice(iter(rows), EVA_BATCHES * batch_size))
    batches = [first[i : i + batch_size] for i in range(0, len(first), batch_size)]
    try:
        found = get_eva_state_dict(
            model,
            _Settling(batches, collate),
            config,
            prepare_model_inputs_fn=lambda batch, _: batch["attention_mask"].bool(),
            prepare_layer_inputs_fn=_tokens,
            gather_distributed_inputs=False,  # all processes look at the same rows
            show_progress_bar=False,
        )
    except (IndexError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error) if isinstance(error, InputError) else one_line(error)
        raise InputError(f"init_lora_weights='eva': {reason}; leave it out") from error
    for name, layer in layers.items():
        weight = layer.lora_A["default"].weight
        with torch.no_grad():
            weight.copy_(found[name][: len(weight)])


class _Settling:
    """Batches made as they are needed; InputError where PEFT asks for more and more of them."""

    def __init__(self, batches: list[list], collate: Callable[[list], dict]):
        self.batches, self.collate, self.made = batches, collate, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict]:
        while True:
            for rows in self.batches:
                self.made += 1
                if self.made > EVA_PASSES:
                    raise InputError(f"directions still change after {EVA_PASSES} batches")
                yield self.collate(rows)


def _tokens(inputs: Any, mask: Tensor, _: str) -> Tensor:
    """A layer's inputs as rows, (tokens, in), without padding where they are those of a text."""
    x = inputs[0] if isinstance(inputs, tuple | list) else inputs
    if x.shape[:2] == mask.shape:
        x = x[mask.to(x.device)]
    return x.reshape(-1, x.shape[-1])
