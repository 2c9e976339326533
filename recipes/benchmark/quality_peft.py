"""PEFT's own way to choose ranks, AdaLoRA, as a run.
Not here: all others (quality_methods.py)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.adalora import AdaLoraLayer, RankAllocator
from quality_rows import supervised_loss
from quality_setting import Found, Setting, largest_values
from quality_training import learning_rates
from torch import Tensor, nn

from darts_lora import DivergedError
from darts_lora.lora.handover import cut
from darts_lora.run.graphs import Graphed


def adalora_run(setting: Setting) -> Found:
    """PEFT's AdaLoRA from 1.5 times the budget's rank, as in its paper (arXiv 2303.10512), as the
    run itself: its schedule over all steps of the task, on the task's learning rates. At its last
    allocation the budget is counted in parameters, by its own importance. What it ends with is
    judged as a plain LoRA, without its singular values of 0."""
    training = setting.retrainer.training
    with adalora_model(setting, training.max_steps) as model:
        train_adalora(model, setting, setting.budget)
        weights = plain_lora(model, setting.retrainer.scaling)
    if not all(value.isfinite().all() for pair in weights.values() for value in pair):
        raise DivergedError(f"find_rate={setting.rate}: a weight is infinite or NaN")
    for name, (a, b) in weights.items():
        if len(a) > (most := setting.retrainer.capacity[name]):
            weights[name] = cut(a, b, most)  # no less where the layer itself is as narrow
    setting.kept = weights
    ranks = {name: len(weights[name][0]) for name in setting.retrainer.shapes}
    return Found(ranks, {"taken": training.max_steps, "run_steps": training.max_steps})


@contextlib.contextmanager
def adalora_model(setting: Setting, steps: int) -> Iterator[PeftModel]:
    """Inside, the model with AdaLoRA's adapters of 1.5 times the budget's rank; its schedule is
    that of a run of so many steps."""
    start = math.ceil(1.5 * setting.budget_rank)
    config = AdaLoraConfig(
        target_modules=list(setting.retrainer.shapes),
        init_r=start,
        target_r=setting.budget_rank,
        lora_alpha=setting.retrainer.scaling * start,
        tinit=steps // 10,
        tfinal=max(1, steps * 3 // 10),
        deltaT=max(1, min(10, steps // 40)),
        total_step=steps,
    )
    torch.manual_seed(setting.seed)
    model = get_peft_model(setting.retrainer.model, config)
    try:
        yield model
    finally:
        model.unload()


def train_adalora(model: PeftModel, setting: Setting, budget: int) -> None:
    """AdamW with the retraining's clipping and schedule; gradients as a CUDA graph on a GPU.

    Args:
        budget: of the last allocation, in parameters: AdaLoRA's own counts singular values.
    """
    training = setting.retrainer.training
    weights = [p for p in model.parameters() if p.requires_grad]
    rate = torch.zeros((), device=setting.retrainer.device)
    optimizer = torch.optim.AdamW(
        weights, lr=rate, weight_decay=training.weight_decay, fused=True,
        capturable=rate.device.type == "cuda",
    )  # fmt: skip
    config, allocator = model.peft_config["default"], model.base_model.rankallocator
    allocator.update_ipt = partial(update_importance, allocator)

    def gradients(batch):
        with half_precision(model):  # base_model adds the term of orthogonality, PeftModel does not
            loss = supervised_loss(model.base_model, batch)
        return loss.detach(), list(torch.autograd.grad(loss, weights, materialize_grads=True))

    on_gpu = setting.retrainer.device.type == "cuda"
    step = Graphed(gradients, pool=torch.cuda.graph_pool_handle()) if on_gpu else gradients
    model.train()
    rates = learning_rates(training, setting.rate)
    for number, (batch, now) in enumerate(zip(setting.batches(len(rates)), rates, strict=True)):
        for weight, gradient in zip(weights, step(batch)[1], strict=True):
            weight.grad = gradient
        if training.max_grad_norm:
            nn.utils.clip_grad_norm_(weights, training.max_grad_norm)
        rate.fill_(now)
        optimizer.step()
        last = number == config.total_step - config.tfinal
        scores = importance(allocator, setting.retrainer.shapes) if last else {}
        model.base_model.update_and_allocate(number)
        if last:
            kept = largest_values(scores, setting.retrainer.shapes, budget)
            config.rank_pattern = {f"{name}.lora_E.default": kept[name].tolist() for name in kept}
            allocator.mask_using_rank_pattern(model.base_model.model, config.rank_pattern)


@torch.no_grad()
def update_importance(allocator: RankAllocator, model: nn.Module) -> None:
    """What the allocator's own update_ipt computes, in few kernels instead of thousands."""
    named = {n: p for n, p in model.named_parameters() if "lora_" in n}
    if not allocator.ipt:
        for kept in (allocator.exp_avg_ipt, allocator.exp_avg_unc):
            kept.update({name: torch.zeros_like(p) for name, p in named.items()})
    mean, doubt = (
        [kept[name] for name in named] for kept in (allocator.exp_avg_ipt, allocator.exp_avg_unc)
    )
    now = torch._foreach_abs(
        torch._foreach_mul(list(named.values()), [p.grad for p in named.values()])
    )
    torch._foreach_mul_(mean, allocator.beta1)
    torch._foreach_add_(mean, now, alpha=1 - allocator.beta1)
    torch._foreach_mul_(doubt, allocator.beta2)
    apart = torch._foreach_abs(torch._foreach_sub(now, mean))
    torch._foreach_add_(doubt, apart, alpha=1 - allocator.beta2)
    allocator.ipt = dict(zip(named, now, strict=True))


def importance(allocator: RankAllocator, names: Iterable[str]) -> dict[str, Tensor]:
    """Layer -> AdaLoRA's score of each singular value (R,), as it ranks them."""

    def score(name: str, part: str) -> Tensor:
        key = f"{name}.lora_{part}.default"
        return allocator.exp_avg_ipt[key] * allocator.exp_avg_unc[key]

    return {n: score(n, "E")[:, 0] + score(n, "A").mean(1) + score(n, "B").mean(0) for n in names}


@torch.no_grad()
def plain_lora(model: PeftModel, scaling: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> A (r, in) and B (out, r) of the LoRA of this scaling (lora_alpha / r) that computes
    what AdaLoRA's P diag(lambda) Q does; singular values of 0 are left out."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, AdaLoraLayer):
            a, b, e = (getattr(layer, f"lora_{part}")["default"] for part in "ABE")
            factor = layer.scaling["default"] / (layer.ranknum["default"] + 1e-5) / scaling
            kept = e[:, 0] != 0
            found[name] = a[kept].clone(), b[:, kept] * e[kept, 0] * factor
    return found


@contextlib.contextmanager
def half_precision(model: nn.Module):
    """PEFT's float32 adapters on a base in 16 bits, as finetune.py trains them."""
    half = model.dtype in (torch.bfloat16, torch.float16)
    with (
        disable_input_dtype_casting(model, active=half),
        torch.autocast(model.device.type, model.dtype if half else None, enabled=half),
    ):
        yield
