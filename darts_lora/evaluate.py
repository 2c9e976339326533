"""How good a model is on the test rows: loss and exact match, with and without the adapter.
Not here: training (finetune.py), nor the table on the screen (recipes/evaluate.py)."""

from __future__ import annotations

import math
import os
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GenerationConfig

from darts_lora.base.bounds import check_bounds
from darts_lora.base.errors import InputError, one_line
from darts_lora.base.files import is_main_process, write_json
from darts_lora.base.options import CONFIG_NAME, load_config
from darts_lora.config import DataConfig, ModelConfig
from darts_lora.data.collator import IGNORED, Collator
from darts_lora.data.label_collator import LabelCollator
from darts_lora.data.loaders import (
    Rows,
    checked_rows,
    load_splits,
    make_collator,
    make_dataloader,
    process_share,
)
from darts_lora.lora.models import load_model, sample_of, weight_samples
from darts_lora.lora.targets import check_fresh
from darts_lora.run.hub import check_hub_options, open_repository, upload
from darts_lora.run.launch import explained
from darts_lora.run.runs import load_finetune
from darts_lora.run.together import other_task, task_of
from darts_lora.views.card import update_figures

# Which rows of the training split are held back as test rows (test_split null).
HELD_BACK_BY = ["test_split", "test_fraction", "split_seed", "split_by", "max_train_samples"]
HELD_BACK_BY += ["streaming"]


@dataclass
class EvaluateConfig:
    """Which adapter is evaluated, and how."""

    adapter: str = "runs/finetune"
    """Folder of the adapter (PEFT's format); evaluation.json is written into it."""
    compare_base: bool = True
    """Evaluate the base model without the adapter as well."""
    eval_batch_size: int = 64
    """Rows of a batch on each process."""
    exact_match: bool = True
    """Generate answers and count those that are the reference's; false: the loss alone, faster."""
    max_new_tokens: int | None = None
    """Longest generated answer (tokens); default: just enough for the batch's reference answers."""
    baseline: str | None = None
    """Folder of another finetune that was evaluated on these rows, of a uniform rank as a rule: its
    figures stand in the model card too."""
    push_to_hub: bool = False
    """Upload the adapter and its card, with these figures, to the hub, as you are logged in."""
    hub_model_id: str | None = None
    """Repository for that, NAME/MODEL; where it is not there yet, a private one is made."""

    def __post_init__(self):
        check_hub_options(self.push_to_hub, self.hub_model_id)
        check_bounds(self, at_least={"eval_batch_size": 1, "max_new_tokens": 1})


def evaluate(
    config: EvaluateConfig, model: ModelConfig, data: DataConfig
) -> dict[str, dict[str, Any]]:
    """Evaluate an adapter, and the base model under it, on the test rows.

    Returns:
        "base" (where asked for) and "adapter" -> loss (mean per supervised token, natural log),
        exact_match (share of rows, in [0, 1]; None where no answer is generated; of a
        classification, the share of right labels), trainable_parameters (count), rows (count).

    Raises:
        InputError: no adapter there, an adapter of another model, bad data, or test rows that the
            adapter may have been trained on.
    """
    if not os.path.isfile(os.path.join(config.adapter, "adapter_config.json")):
        raise InputError(
            f"adapter={config.adapter!r}: no adapter_config.json there; run "
            "`accelerate launch recipes/finetune.py` first, or name the folder with --adapter"
        )
    _check_unseen(config.adapter, data)
    beside = _figures_beside(config.baseline, model, data)
    if config.push_to_hub and is_main_process():
        open_repository(config.hub_model_id)
    with explained():
        accelerator = Accelerator()
    rows = load_splits(data, ["test"])["test"]
    collator = make_collator(model, data)
    rows, _ = checked_rows(rows, collator, data)
    # Recomputing activations is for training; generation would lose its cache to it.
    base = load_model(replace(model, gradient_checkpointing=False))
    samples = weight_samples(base)
    collator.limits.of_model(base)
    adapted = _load_adapter(base, config.adapter).to(accelerator.device)
    if config.compare_base:
        _check_base(samples, config.adapter)
    check_fresh(adapted, f"adapter={config.adapter!r}")
    options = {
        "batch_size": config.eval_batch_size,
        "exact_match": config.exact_match,
        "max_new_tokens": config.max_new_tokens,
        "accelerator": accelerator,
    }
    results = {}
    if config.compare_base:
        with adapted.disable_adapter():
            results["base"] = score(adapted, rows, collator, name="base", **options)
        results["base"]["trainable_parameters"] = 0
    results["adapter"] = score(adapted, rows, collator, name="adapter", **options)
    results["adapter"]["trainable_parameters"] = adapted.get_nb_trainable_parameters()[0]
    if accelerator.is_main_process:
        try:
            write_json(os.path.join(config.adapter, "evaluation.json"), results)
            update_figures(config.adapter, {**results, **beside})
        except InputError as error:  # an adapter of others, or no space: the figures are there
            warnings.warn(f"{error}: what was measured is in no file", stacklevel=2)
        if config.push_to_hub:
            upload(config.adapter, config.hub_model_id)
    return results


def _figures_beside(
    folder: str | None, model: ModelConfig, data: DataConfig
) -> dict[str, dict[str, Any]]:
    """Name -> figures of another finetune; InputError where they are of other rows or not there."""
    if folder is None:
        return {}
    ours, theirs = {**asdict(model), **asdict(data)}, task_of(folder)
    if name := other_task(ours, theirs):
        raise InputError(
            f"baseline={folder!r}: has {name}={theirs[name]!r}, this adapter has "
            f"{name}={ours[name]!r}: their losses cannot be compared"
        )
    found = load_finetune(folder)
    return {f"baseline {found['name']}": found}


def _check_unseen(adapter: str, data: DataConfig) -> None:
    """InputError where rows of the training split are held back now that were not in the adapter's
    run, as its config.yaml says; a finetune that looks for a test split trains on all of them."""
    path = os.path.join(adapter, CONFIG_NAME)
    if data.test_split is not None or not os.path.isfile(path):
        return
    trained = load_config(path)
    for name in HELD_BACK_BY:
        ours = getattr(data, name)
        if ours != trained.get(name, ours):
            raise InputError(
                f"{name}={ours!r}: the adapter was trained with {name}={trained[name]!r}, so rows "
                "held back now may be rows that it has seen; keep that, or name a split or file of "
                "other rows by test_split or data_files"
            )


def _check_base(samples: list[tuple[Tensor, Tensor]], adapter: str) -> None:
    """InputError where loading the adapter changed the base model, as PiSSA's does: what is left
    without the adapter is no base to compare with then."""
    if not all(torch.equal(sample, sample_of(weight)) for weight, sample in samples):
        raise InputError(
            f"adapter={adapter!r}: changes the base model's weights when it is loaded "
            "(init_lora_weights in its adapter_config.json), so the base cannot be evaluated "
            "beside it; use --compare_base false"
        )


def _load_adapter(base: nn.Module, folder: str) -> PeftModel:
    try:
        with warnings.catch_warnings():  # PEFT warns of modules that stay as they were initialised
            warnings.filterwarnings("error", "Found missing adapter keys")
            # "Trainable" only so that PEFT can count the parameters.
            model = PeftModel.from_pretrained(base, folder, is_trainable=True)
        # PEFT drops weights that no module asks for: a second time, for the list of them
        state = load_peft_weights(folder, device="cpu")
        loaded: Any = set_peft_model_state_dict(model, state)
        if unused := loaded.unexpected_keys:
            raise ValueError(f"{len(unused)} of its weights belong to no layer, first {unused[0]}")
        return model
    except Exception as error:  # any kind: damaged files, fields that PEFT does not expect
        reason = one_line(error)
        raise InputError(
            f"adapter={folder!r}: cannot be loaded into the model ({reason}); "
            "is model_name_or_path the model that it was trained on?"
        ) from error


@torch.no_grad()
def score(
    model: nn.Module,
    rows: Rows,
    collator: Collator | LabelCollator,
    *,
    batch_size: int = 64,
    exact_match: bool = True,
    max_new_tokens: int | None = None,
    accelerator: Accelerator | None = None,
    name: str = "evaluate",
) -> dict[str, Any]:
    """Loss and exact match of a model on rows, each row once, over all processes.

    An answer counts as exact where the greedy continuation of its prompt, without special tokens
    and surrounding blanks, is the one that training teaches: the reference, with what the chat
    template writes around it. A label counts where it is the most probable one.

    Returns:
        loss (mean per supervised token or row, natural log), exact_match (share of rows, in [0, 1];
        None for rows without a prompt, or if not asked for), rows (count), supervised_tokens
        (count; labels of a classification).
    """
    accelerator = accelerator or Accelerator()
    model.eval()
    # accelerate's shares repeat rows, and of a stream it does not know which
    rows = process_share(rows, accelerator.process_index, accelerator.num_processes)
    loader = make_dataloader(rows, collator.evaluation if exact_match else collator, batch_size)
    totals = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    often = 0.5 if sys.stderr.isatty() else 10  # few lines in a file
    shown = accelerator.is_main_process
    for batch in tqdm(loader, name, unit="batch", disable=not shown, mininterval=often):
        batch = send_to_device(batch if exact_match else {"whole": batch}, accelerator.device)
        losses, tokens, right = _row_losses(model, batch["whole"])
        if "answers" in batch:
            prompt, answers = batch["prompt"], batch["answers"]
            exact = _exact(model, prompt, answers, collator.tokenizer, max_new_tokens)
            right = torch.tensor(exact, device=losses.device)
        values = torch.stack([losses, tokens, right, torch.ones_like(losses)], dim=1)
        totals += values.double().sum(0)
    loss, tokens, right, count = accelerator.reduce(totals).tolist()
    return {
        "loss": loss / tokens if math.isfinite(loss) else None,
        "exact_match": right / count if math.isfinite(right) else None,
        "rows": int(count),
        "supervised_tokens": int(tokens),
    }


def _row_losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, number of the supervised tokens and whether the label is right (NaN where
    rows have no label), of each row, float32 (rows,)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if batch["labels"].dim() == 1:  # classification
        logits, targets = model(**inputs).logits.float(), batch["labels"]
        losses = cross_entropy(logits, targets, reduction="none")
        return losses, torch.ones_like(losses), (logits.argmax(-1) == targets).float()
    targets = batch["labels"][:, 1:]
    supervised = targets != IGNORED
    # Float32 logits of the supervised tokens only: all of them would take gigabytes.
    logits = model(**inputs, use_cache=False).logits[:, :-1][supervised].float()
    losses = cross_entropy(logits, targets[supervised], reduction="none")
    sums = losses.new_zeros(len(targets)).index_add_(0, supervised.nonzero()[:, 0], losses)
    return sums, supervised.sum(1).float(), torch.full_like(sums, math.nan)


def _exact(
    model: Any,
    prompt: dict[str, Tensor],
    answers: list[list[int]],
    tokenizer,
    longest: int | None,
) -> list[float]:
    """1.0 for each row whose generated answer is the reference, else 0.0."""
    if longest is None:
        # One token more than the longest reference tells apart an answer that goes on.
        longest = 1 + max(map(len, answers))
    options = {"max_new_tokens": longest, "pad_token_id": tokenizer.pad_token_id}
    with _greedy(model):
        end = _end_tokens(model, tokenizer)
        tokens = model.generate(**prompt, **options, do_sample=False, eos_token_id=end)
    new = tokens[:, prompt["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    wanted = tokenizer.batch_decode(answers, skip_special_tokens=True)
    pairs = zip(texts, wanted, strict=True)
    return [float(text.strip() == answer.strip()) for text, answer in pairs]


@contextmanager
def _greedy(model: Any):
    """Without what the checkpoint's generation_config asks for beside its tokens: penalties, beams.

    It is put into the model: one that `generate` is given is filled up from the model's.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    own = base.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    base.generation_config = GenerationConfig(**{name: getattr(own, name) for name in names})
    try:
        yield
    finally:
        base.generation_config = own


def _end_tokens(model: Any, tokenizer) -> list[int] | None:
    """What ends an answer: for the model, and for the tokenizer, whose end token was learnt."""
    known = model.generation_config.eos_token_id
    tokens = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}
    return sorted(tokens) or None
