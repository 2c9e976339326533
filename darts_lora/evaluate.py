"""How good a model is on the test rows: loss and exact match, with and without the adapter.
Not here: training (finetune.py), nor the table on the screen (recipes/evaluate.py)."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from darts_lora.collator import IGNORED, Collator
from darts_lora.config import DataConfig, ModelConfig
from darts_lora.data import load_splits, make_dataloader
from darts_lora.errors import InputError
from darts_lora.files import write_json
from darts_lora.models import load_model, load_processor


@dataclass
class EvaluateConfig:
    """Which adapter is evaluated, and how."""

    adapter: str = "runs/finetune"
    """Folder of the adapter (PEFT's format); evaluation.json is written into it."""
    compare_base: bool = True
    """Evaluate the base model without the adapter as well."""
    eval_batch_size: int = 64
    """Rows of a batch on each process."""
    max_new_tokens: int | None = None
    """Longest generated answer (tokens); default: just enough for the batch's reference answers."""

    def __post_init__(self):
        for name in ("eval_batch_size", "max_new_tokens"):
            value = getattr(self, name)
            optional = name == "max_new_tokens" and value is None
            if not optional and (type(value) is not int or value < 1):
                raise InputError(f"{name}={value!r}: must be an integer >= 1")


def evaluate(
    config: EvaluateConfig, model: ModelConfig, data: DataConfig
) -> dict[str, dict[str, Any]]:
    """Evaluate an adapter, and the base model under it, on the test rows.

    Returns:
        "base" (where asked for) and "adapter" -> loss (mean per supervised token, natural log),
        exact_match (share of rows, in [0, 1]), trainable_parameters (count), rows (count).

    Raises:
        InputError: no adapter there, an adapter of another model, or bad data.
    """
    if not os.path.isfile(os.path.join(config.adapter, "adapter_config.json")):
        raise InputError(
            f"adapter={config.adapter!r}: no adapter_config.json there; run "
            "`accelerate launch recipes/finetune.py` first, or name the folder with --adapter"
        )
    accelerator = Accelerator()
    rows = load_splits(data, ["test"])["test"]
    collator = Collator(load_processor(model), data.max_length)
    # Recomputing activations is for training; generation would lose its cache to it.
    base = load_model(replace(model, gradient_checkpointing=False))
    adapted = _load_adapter(base, config.adapter).to(accelerator.device)
    options = {
        "batch_size": config.eval_batch_size,
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
        write_json(os.path.join(config.adapter, "evaluation.json"), results)
    return results


def _load_adapter(base: nn.Module, folder: str) -> PeftModel:
    try:
        # "Trainable" only so that PEFT can count the parameters; dtypes as finetune trained them.
        return PeftModel.from_pretrained(
            base, folder, is_trainable=True, autocast_adapter_dtype=False
        )
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"adapter={folder!r}: cannot be loaded into the model ({reason}); "
            "is model_name_or_path the model that it was trained on?"
        ) from error


@torch.no_grad()
def score(
    model: nn.Module,
    rows: Dataset,
    collator: Collator,
    *,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    accelerator: Accelerator | None = None,
    name: str = "evaluate",
) -> dict[str, Any]:
    """Loss and exact match of a model on rows, each row once, over all processes.

    An answer counts as exact where the greedy continuation of its prompt, without special tokens
    and surrounding blanks, is the reference.

    Returns:
        loss (mean per supervised token, natural log), exact_match (share of rows, in [0, 1]),
        rows (count), supervised_tokens (count).
    """
    accelerator = accelerator or Accelerator()
    model.eval()
    loader = make_dataloader(rows, _EvaluationBatch(collator), batch_size)
    loader = accelerator.prepare_data_loader(loader, device_placement=True)
    totals = torch.zeros(4, dtype=torch.float64)
    for batch in tqdm(loader, name, unit="batch", disable=not accelerator.is_main_process):
        losses, tokens = _row_losses(model, batch["whole"])
        exact = _exact(model, batch["prompt"], batch["answers"], collator.tokenizer, max_new_tokens)
        exact = torch.tensor(exact, device=losses.device)
        values = torch.stack([losses, tokens, exact, torch.ones_like(losses)], dim=1)
        totals += accelerator.gather_for_metrics(values).double().sum(0).cpu()
    loss, tokens, exact, count = totals.tolist()
    return {
        "loss": loss / tokens if math.isfinite(loss) else None,
        "exact_match": exact / count,
        "rows": int(count),
        "supervised_tokens": int(tokens),
    }


class _EvaluationBatch:
    """Rows -> whole conversations with labels, prompts to continue, reference answers."""

    def __init__(self, collator: Collator):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        prompt, answers = self.collator.prompts(rows)
        return {"whole": self.collator(rows), "prompt": prompt, "answers": answers}


def _row_losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of the losses and number of the supervised tokens of each row, float32 (rows,)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    supervised = targets != IGNORED
    # Float32 logits of the supervised tokens only: all of them would take gigabytes.
    logits = model(**inputs, use_cache=False).logits[:, :-1][supervised].float()
    losses = cross_entropy(logits, targets[supervised], reduction="none")
    sums = losses.new_zeros(len(targets)).index_add_(0, supervised.nonzero()[:, 0], losses)
    return sums, supervised.sum(1).float()


def _exact(
    model: nn.Module, prompt: dict[str, Tensor], answers: list[str], tokenizer, longest: int | None
) -> list[float]:
    """1.0 for each row whose generated answer is the reference, else 0.0."""
    if longest is None:
        # One token more than the longest reference tells apart an answer that goes on.
        longest = 1 + max(map(len, tokenizer(answers, add_special_tokens=False)["input_ids"]))
    tokens = model.generate(
        **prompt,
        max_new_tokens=longest,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_end_tokens(model, tokenizer),
    )
    new = tokens[:, prompt["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    pairs = zip(texts, answers, strict=True)
    return [float(text.strip() == answer.strip()) for text, answer in pairs]


def _end_tokens(model: nn.Module, tokenizer) -> list[int] | None:
    """What ends an answer: for the model, and for the tokenizer, whose end token was learnt."""
    known = model.generation_config.eos_token_id
    tokens = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}
    return sorted(tokens) or None
