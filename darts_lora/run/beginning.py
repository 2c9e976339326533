"""Where a finetune begins: a genotype as a PEFT model, its first weights, the step of the run.
Not here: the training (finetune.py), how the weights of a search are cut (handover.py)."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from peft import PeftModel, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from darts_lora.base.bounds import check_bounds
from darts_lora.base.errors import InputError, one_line, told_as
from darts_lora.base.files import read_json
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.data.places import ROW
from darts_lora.data.sources import Rows
from darts_lora.genotype import Genotype, read_tensors
from darts_lora.lora.adapter import add_lora
from darts_lora.lora.padded import check_servable
from darts_lora.lora.parts import task_type
from darts_lora.lora.targets import (
    check_fresh,
    check_unshared,
    match_modules,
    match_parameters,
    match_saved_modules,
    outside,
)
from darts_lora.lora.variants import check_variants, keep_function, variant_options
from darts_lora.run.checkpoint import FINETUNE, check_free, steps_done
from darts_lora.run.course import digest
from darts_lora.run.hub import check_hub_options
from darts_lora.run.together import other_task, task_of
from darts_lora.supernet import SUPERNET_NAME, Supernet

RECORD_NAME = "finetune.json"
SPLIT_NAME = "split.json"


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
    Default: inherit where the search took a part of the run (search_fraction), and
    init_lora_weights is not given."""
    init_lora_weights: str | None = None
    """Where fresh LoRA weights begin (init scratch), as in PEFT: gaussian; pissa: the base's
    largest singular parts, which the base loses, so that no engine can follow; eva: A along what
    the layers' inputs are on training rows. Default: PEFT's own."""
    use_rslora: bool = False
    """rsLoRA, as in PEFT: one lora_alpha for all layers, over the square root of each rank. A layer
    of the mean rank keeps the genotype's scaling."""
    use_dora: bool = False
    """DoRA, as in PEFT: a magnitude for each output is trained too, which no budget counts."""
    loraplus_lr_ratio: float | None = None
    """LoRA+: B learns at this many times the learning rate of A. Default: 1, at the same rate."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the LoRA weights. float32 on a base in 16 bits trains under autocast."""
    pad_to_max: bool = False
    """Save the adapter a second time, in output_dir/padded, as all engines that serve read it: with
    zeros up to the largest rank for all layers of the types that are adapted."""
    output_dir: str = "runs/finetune"
    """Folder for the adapter, its card (README.md), finetune.json, config.yaml and checkpoints."""
    resume: bool = False
    """Go on from the newest checkpoint in output_dir."""
    report_to: str | list[str] = "tensorboard"
    """Trackers of the losses: one or several of tensorboard, wandb, trackio, mlflow, comet_ml and
    what else accelerate knows; all that are installed; or none. A search's are not taken over."""
    push_to_hub: bool = False
    """Upload the adapter and its card to the hub when it is trained, as you are logged in there."""
    hub_model_id: str | None = None
    """Repository for that, NAME/MODEL; where it is not there yet, a private one is made."""
    seed: int = 0
    """Seed of the LoRA weights and of the data order."""

    def __post_init__(self):
        check_bounds(
            self,
            at_least={"rank": 1, "seed": 0, "loraplus_lr_ratio": 1.0},
            above={"scaling": 0.0},
        )
        if self.rank is None and self.genotype is None:
            raise InputError("genotype=None: give a genotype, or a rank for a uniform baseline")
        if self.rank is not None and self.init == "inherit":
            raise InputError("init='inherit': a search leaves weights for its genotype alone")
        check_hub_options(self.push_to_hub, self.hub_model_id)
        check_variants(self.init, self.init_lora_weights, self.use_dora, self.pad_to_max)


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
    if config.pad_to_max:
        check_servable(None, False, genotype.stacked)
    source = (supernet or _weights_path(config)) if config.init == "inherit" else None
    variant = variant_options(
        config.use_rslora, config.use_dora, config.init_lora_weights, genotype.stacked
    )
    model = plain_adapter(base, genotype, source, f"genotype={config.genotype!r}", **variant)
    if config.adapter_dtype == "bfloat16":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    return model


def plain_adapter(
    base: nn.Module,
    genotype: Genotype,
    source: Supernet | str | None,
    name: str = "genotype",
    **variant: Any,
) -> PeftModel:
    """`base` as a PEFT model of the genotype's ranks, with what the supernet (itself, or its file)
    learnt as its weights, or with fresh ones; `name` is what errors call the genotype, `variant`
    are fields of the LoraConfig (variants.py)."""
    genotype = genotype.with_shapes(base)
    check_unshared(base, [name for name, rank in genotype.ranks.items() if rank])
    lora_config = genotype.to_lora_config(base, task_type=task_type(base), **variant)
    model = add_lora(base, lora_config, genotype.ranks, genotype.modules_to_save)
    check_fresh(model, name)
    if source is not None:
        inherit(model, genotype, source)
    return model


def inherit(model: PeftModel, genotype: Genotype, source: Supernet | str) -> None:
    """Copy what the supernet learnt (itself, or its file) into the adapter, whatever its variant:
    all, or InputError."""
    name = source if isinstance(source, str) else "the supernet"
    own = (".lora_A.", ".lora_B.")  # no magnitudes: a search has none
    _fill(model, genotype.inherited_state(source), f"init='inherit': {name}", own)
    keep_function(model, genotype.scaling)


def load_adapter(model: PeftModel, path: str) -> None:
    """Copy an adapter's weights (safetensors) into a model that has one of the same shape: all, or
    InputError."""
    _fill(model, read_tensors(path, "adapter"), path, (".lora_",))


def _fill(model: PeftModel, state: dict[str, Tensor], name: str, own: tuple[str, ...]) -> None:
    """`own` are parts of the keys that must all be there."""
    with told_as(f"{name} is of another model", RuntimeError):
        result: Any = set_peft_model_state_dict(model, state)
    missing = [key for key in result.missing_keys if any(part in key for part in own)]
    if missing or result.unexpected_keys:
        raise InputError(f"{name} does not fill {missing + result.unexpected_keys}")


def _searched_part(genotype: Genotype | None) -> int:
    """Weight steps that the search took of its run; 0 where it took all of them."""
    found = genotype.found_by if genotype is not None else {}
    steps, run_steps = found.get("steps"), found.get("run_steps")
    partly = type(steps) is int and type(run_steps) is int and 0 < steps < run_steps
    return steps if partly else 0


def resolve_init(
    config: FinetuneConfig, genotype: Genotype | None
) -> Literal["scratch", "inherit"]:
    """Where the weights come from."""
    if config.init is not None or config.rank is not None or config.init_lora_weights is not None:
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


def first_rows(
    config: FinetuneConfig, rows: Rows, model: ModelConfig, data: DataConfig
) -> list[int] | None:
    """Numbers of the rows that the search has not taken in its last epoch, validation rows among
    them: they come first. None: all alike, since no search went before, or none of these rows.

    Raises:
        InputError: the search's split.json cannot be read.
    """
    folder = os.path.dirname(config.genotype or "")
    path = os.path.join(folder, SPLIT_NAME)
    if config.init != "inherit" or data.streaming or not os.path.isfile(path):
        return None
    theirs = task_of(folder)
    if other_task(asdict(model) | asdict(data), theirs) is not None:
        return None
    try:
        taken = set(read_json(path).get("taken", ()))
    except (InputError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: is not what a search leaves ({one_line(error)})") from error
    return [i for i, number in enumerate(rows[ROW]) if number not in taken]


def finished(output_dir: str) -> dict[str, Any] | None:
    """The record of the finetune that ended there; None: none did."""
    if not os.path.isfile(os.path.join(output_dir, SAFETENSORS_WEIGHTS_NAME)):
        return None
    try:
        record = read_json(os.path.join(output_dir, RECORD_NAME))
    except InputError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("course"), dict) else None


def check_finetune_start(output_dir: str, resume: bool) -> None:
    """Whether a finetune may start, or go on, in this folder; or InputError (check_free)."""
    if not finished(output_dir):
        check_free(output_dir, FINETUNE, resume, ended=False)


def goes_on(output_dir: str, genotype: Genotype) -> bool:
    """Whether a finetune of that search is in the folder, finished or not."""
    done, unfinished = finished(output_dir), steps_done(output_dir, FINETUNE)
    course = done["course"] if done else unfinished[1] if unfinished else {}
    return course.get("genotype") == digest(asdict(genotype))


def _weights_path(config: FinetuneConfig) -> str:
    return os.path.join(os.path.dirname(config.genotype), SUPERNET_NAME)
