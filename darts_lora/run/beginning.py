"""Where a finetune begins: a genotype as a PEFT model, its first weights, the step of the run.
Not here: the training (finetune.py), how the weights of a search are cut (handover.py)."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

from peft import PeftModel, set_peft_model_state_dict
from torch import nn

from darts_lora.base.bounds import check_bounds
from darts_lora.base.errors import InputError
from darts_lora.config import TrainingConfig
from darts_lora.genotype import Genotype
from darts_lora.lora.adapter import add_lora
from darts_lora.lora.parts import task_type
from darts_lora.lora.targets import (
    check_fresh,
    check_unshared,
    match_modules,
    match_parameters,
    match_saved_modules,
    outside,
)
from darts_lora.supernet import SUPERNET_NAME, Supernet


@dataclass
class FinetuneConfig:
    """What is retrained, from where, and where it goes."""

    genotype: str | None = "runs/search/genotype.json"
    """File of the genotype (JSON). null, together with rank: the layers of target_modules."""
    rank: int | None = None
    """Uniform baseline: this rank for every layer of the genotype; default: the genotype's own."""
    target_modules: str | list[str] = "all-linear"
    """Layers of a uniform baseline without a genotype, as in a search."""
    target_parameters: str | list[str] | None = None
    """Experts of a uniform baseline without a genotype, as in a search."""
    scaling: float = 2.0
    """lora_alpha / r of a uniform baseline without a genotype."""
    init: Literal["scratch", "inherit"] | None = None
    """inherit: go on from the weights that the search left beside the genotype, with the steps and
    the learning rate that it left of the run; scratch: fresh LoRA weights, all of max_steps.
    Default: inherit where the search took a part of the run (search_fraction)."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the LoRA weights. float32 on a base in 16 bits trains under autocast."""
    pad_to_max: bool = False
    """Save the adapter a second time, with zeros up to the largest rank for all layers, in
    output_dir/padded: for engines that ignore rank_pattern."""
    output_dir: str = "runs/finetune"
    """Folder for the adapter, finetune.json and config.yaml."""
    report_to: str | list[str] = "tensorboard"
    """Trackers of the losses: one or several of tensorboard, wandb, trackio, mlflow, comet_ml and
    what else accelerate knows; all that are installed; or none. A search's are not taken over."""
    seed: int = 0
    """Seed of the LoRA weights and of the data order."""

    def __post_init__(self):
        check_bounds(
            self,
            at_least={"rank": 1, "seed": 0},
            above={"scaling": 0.0},
        )
        if self.rank is None and self.genotype is None:
            raise InputError("genotype=None: give a genotype, or a rank for a uniform baseline")
        if self.rank is not None and self.init == "inherit":
            raise InputError("init='inherit': a search leaves weights for its genotype alone")


def add_adapter(
    base: nn.Module,
    config: FinetuneConfig,
    genotype: Genotype | None,
    supernet: Supernet | None = None,
) -> PeftModel:
    """`base` with fresh LoRA weights, or with those that the supernet (or else its file) has.

    Raises:
        InputError: layers that are not in the model, or share their weights; no searched weights to
            inherit, a genotype that does not train what the model's checkpoint lacks, or another
            adapter than it says.
    """
    if genotype is None:
        names = match_modules(base, config.target_modules)
        saved = match_saved_modules(base, None)
        names += match_parameters(base, config.target_parameters, config.target_modules)
        ranks = dict.fromkeys(outside(names, saved), 1)
        genotype = Genotype(ranks, config.scaling, modules_to_save=saved)
    if config.rank is not None:
        genotype = replace(genotype, ranks=dict.fromkeys(genotype.ranks, config.rank))
    genotype = genotype.with_shapes(base)
    if config.pad_to_max and genotype.stacked:
        raise InputError(
            f"pad_to_max=true: {genotype.stacked[0]} is a parameter of experts, which engines that "
            "ignore rank_pattern do not read either; leave pad_to_max out"
        )
    source = (supernet or _weights_path(config)) if config.init == "inherit" else None
    model = plain_adapter(base, genotype, source, f"genotype={config.genotype!r}")
    if config.adapter_dtype == "bfloat16":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    return model


def plain_adapter(
    base: nn.Module, genotype: Genotype, source: Supernet | str | None, name: str = "genotype"
) -> PeftModel:
    """`base` as a PEFT model of the genotype's ranks, with what the supernet (itself, or its file)
    learnt as its weights, or with fresh ones; `name` is what errors call the genotype."""
    genotype = genotype.with_shapes(base)
    check_unshared(base, [name for name, rank in genotype.ranks.items() if rank])
    lora_config = genotype.to_lora_config(base, task_type=task_type(base))
    model = add_lora(base, lora_config, genotype.ranks, genotype.modules_to_save)
    check_fresh(model, name)
    if source is not None:
        inherit(model, genotype, source)
    return model


def inherit(model: PeftModel, genotype: Genotype, source: Supernet | str) -> None:
    """Copy what the supernet learnt (itself, or its file) into the adapter: all, or InputError."""
    path = source if isinstance(source, str) else "the supernet"
    state = genotype.inherited_state(source)
    try:
        result = set_peft_model_state_dict(model, state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"init='inherit': {path} is of another model ({reason})") from error
    missing = [key for key in result.missing_keys if "lora_" in key]
    if missing or result.unexpected_keys:
        raise InputError(f"init='inherit': {path} does not fill {missing + result.unexpected_keys}")


def _searched_part(genotype: Genotype | None) -> int:
    """Weight steps that the search took of its run; 0 where it took all of them."""
    found = genotype.found_by if genotype is not None else {}
    steps, run_steps = found.get("steps"), found.get("run_steps")
    partly = type(steps) is int and type(run_steps) is int and 0 < steps < run_steps
    return steps if partly else 0


def resolve_init(config: FinetuneConfig, genotype: Genotype | None) -> str:
    """Where the weights come from."""
    if config.init is not None or config.rank is not None:
        return config.init or "scratch"
    return "inherit" if _searched_part(genotype) else "scratch"


def first_step(config: FinetuneConfig, genotype: Genotype | None, training: TrainingConfig) -> int:
    """Weight steps of the run that the search took.

    Raises:
        InputError: it left none, or no weights.
    """
    if config.init != "inherit":
        return 0
    path, first = _weights_path(config), _searched_part(genotype)
    if not os.path.isfile(path):
        raise InputError(
            f"init='inherit': there is no {path} to go on from; put the search's own beside the "
            "genotype, or train it anew with --init scratch"
        )
    if first >= training.max_steps:
        raise InputError(
            f"max_steps={training.max_steps}: the run's steps, of which the search took {first} "
            "already; give more, or --init scratch"
        )
    return first


def _weights_path(config: FinetuneConfig) -> str:
    return os.path.join(os.path.dirname(config.genotype), SUPERNET_NAME)
