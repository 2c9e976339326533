"""Rivals at equal cost: what they spend on finding ranks is paid for with steps of their training.
Not here: AdaLoRA (quality_peft.py), the search (quality_methods.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from quality_rows import supervised_loss
from quality_setting import (
    Found,
    Setting,
    Weights,
    largest_gain,
    largest_values,
    parameters,
    scaled_to_budget,
)
from quality_training import Plan, Retrainer, Retraining
from torch import Tensor, nn

from darts_lora.data.splits import hold_back
from darts_lora.lora.cost import parameters_per_rank
from darts_lora.lora.handover import cut

DIVERGED = "the training loss is infinite or NaN"
LARGE = 4  # ranks that are cut, over the budget's
TRAINED = 0.9  # share of the steps before the cut
SCORED_BATCHES = 8
GORA_BATCHES = 32
GORA_RATE = 5e-2  # of the first step, which B begins with
ALPHA_RATE = 0.03  # the published 3e-4 is for thousands of steps


def paid_batches(wanted: int, setting: Setting) -> int:
    """So many batches, but at most a quarter of the run: they are paid for with weight steps."""
    return max(1, min(wanted, setting.retrainer.training.max_steps // 4))


def cut_heal(settings: Sequence[Setting], *, fisher: bool = False) -> list[Found]:
    """Train large, cut, heal (PARA, arXiv 2604.27796; PEFT's save_as_lora): a uniform LoRA of four
    times the budget's rank is trained for nine tenths of the steps, then cut to the budget over all
    layers, and goes on with its weights for the last tenth, on the same course of the rate.

    What is kept are whole columns of the singular value decompositions: the largest total of
    squared singular values; with `fisher` of E[(sigma v.x u.g)^2], x a layer's input and g its
    output's gradient, over eight batches that take the place of as many steps.

    Args:
        settings: of one budget.
    """
    retrainer, rows = settings[0].retrainer, settings[0].rows
    looks = paid_batches(SCORED_BATCHES, settings[0]) if fisher else 0
    steps = retrainer.training.max_steps - looks
    taken = max(1, min(steps - 1, round(TRAINED * steps)))
    large = LARGE * settings[0].budget_rank
    plan = {name: min(large, most) for name, most in retrainer.capacity.items()}
    jobs = [
        Retraining(plan, s.indices, s.seed, s.rate, run_steps=steps, until=taken) for s in settings
    ]
    trained = [record["train_loss"] is not None for record in retrainer.retrain(jobs, rows)]
    if not any(trained):
        return [Found.diverged(setting, DIVERGED) for setting in settings]
    factors = _singular(retrainer, plan, trained)
    scores = {n: a.square().sum(2) * b.square().sum(1) for n, (a, b) in factors.items()}
    if fisher:
        retrainer.load(factors)
        after = [replace(job, read=taken) for job in jobs]
        batches = (rows.batch(*parts) for parts in retrainer.order(after, rows, looks))
        scores = retrainer.column_scores(batches)
    found = []
    for number, setting in enumerate(settings):
        if trained[number]:
            own = {name: (a[number], b[number]) for name, (a, b) in factors.items()}
            score = {name: value[number, : plan[name]] for name, value in scores.items()}
            ranks = _keep_best(setting, own, score)
            run = {"taken": taken, "run_steps": steps, "read": taken + looks}
            found.append(Found(ranks, run))
        else:
            found.append(Found.diverged(setting, DIVERGED))
    return found


def _singular(
    retrainer: Retrainer, plan: Plan, trained: list[bool]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> A (S, R, in) and B (S, out, R) of the plans that were trained last: the same LoRAs,
    their columns those of the singular value decomposition."""
    pairs = [retrainer.trained(number) for number in range(len(trained))]
    usable = torch.tensor(trained, device=retrainer.device)[:, None, None]
    found = {}
    for name, rank in plan.items():
        a = torch.stack([pair[name][0][:rank] for pair in pairs])
        b = torch.stack([pair[name][1][:, :rank] for pair in pairs])
        found[name] = cut(a.where(usable, 0.0), b.where(usable, 0.0), rank)  # no NaN in the SVD
    return found


def _keep_best(setting: Setting, weights: Weights, scores: dict[str, Tensor]) -> Plan:
    """The ranks of the largest total score within the budget, whose columns are kept."""
    orders = {name: score.argsort(descending=True) for name, score in scores.items()}
    most = max(map(len, scores.values()))
    gains = {
        name: nn.functional.pad(score[orders[name]], (0, most - len(score)))
        for name, score in scores.items()
    }
    chosen = largest_gain(gains, setting.retrainer.shapes, range(most + 1), setting.budget)
    ranks = {name: min(rank, len(scores[name])) for name, rank in chosen.items()}
    for name, columns in orders.items():
        best, (a, b) = columns[: ranks[name]], weights[name]
        setting.kept[name] = a[best].float(), b[:, best].float()
    return ranks


def gora(setting: Setting, *, starts: bool = False) -> Found:
    """GoRA (arXiv 2502.12171): ranks in proportion to mean |W * G| over the cost, G the mean of the
    weight's gradients over 32 batches, clipped to half and four times the budget's rank as its 4
    and 32 are at rank 8; then scaled to the budget, from which clipping departs. These batches take
    the place of as many weight steps, and are not read again before all others.

    With `starts` its first B as well: s B A is the gradient's step of the published rate, projected
    onto the rows of A. The scale s is that of all methods.
    """
    retrainer, rank = setting.retrainer, setting.budget_rank
    count = paid_batches(GORA_BATCHES, setting)
    means = mean_gradients(setting, count)
    worth = {
        name: float((retrainer.originals[name].weight.float() * mean).abs().mean())
        for name, mean in means.items()
    }
    whole = setting.budget / max(sum(worth.values()), 1e-300)
    ranks = {
        name: min(max(round(whole * worth[name]) // parameters_per_rank(*shape), rank // 2, 1),
                  4 * rank, retrainer.capacity[name])
        for name, shape in retrainer.shapes.items()
    }  # fmt: skip
    ranks = scaled_to_budget(ranks, retrainer.shapes, retrainer.capacity, setting.budget)
    if starts:
        setting.kept = gora_weights(setting, means, ranks)
    steps = retrainer.training.max_steps - count
    return Found(ranks, {"run_steps": steps, "read": count, "importance": list(worth.values())})


def gora_weights(setting: Setting, gradients: dict[str, Tensor], ranks: Plan) -> Weights:
    """GoRA's first A, as PEFT's, and B = -lr sqrt(in / r) / s G A^T (A A^T + 1e-8 I)^-1."""
    retrainer, found = setting.retrainer, {}
    generator = torch.Generator().manual_seed(setting.seed)
    for name, rank in ranks.items():
        width_in, _ = retrainer.shapes[name]
        a = torch.empty(rank, width_in)
        if rank:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        a, gradient = a.to(retrainer.device), gradients[name]
        if hasattr(retrainer.originals[name], "nf"):
            gradient = gradient.T  # of transformers' Conv1D
        inverse = torch.linalg.inv(a @ a.T + 1e-8 * torch.eye(rank, device=a.device))
        step = GORA_RATE * math.sqrt(width_in / max(rank, 1)) / retrainer.scaling
        found[name] = a, -step * gradient @ a.T @ inverse
    return found


def mean_gradients(setting: Setting, count: int) -> dict[str, Tensor]:
    """Layer -> mean over so many batches of the gradient of its weight (float32)."""
    model, names = setting.retrainer.model, list(setting.retrainer.shapes)
    weights = [setting.retrainer.originals[name].weight for name in names]
    sums = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    model.eval()
    for weight in weights:
        weight.requires_grad_(True)
    for batch in setting.batches(count):
        found = torch.autograd.grad(supervised_loss(model, batch), weights, materialize_grads=True)
        for total, gradient in zip(sums, found, strict=True):
            total += gradient
    for weight in weights:
        weight.requires_grad_(False)
    return {name: total / count for name, total in zip(names, sums, strict=True)}


def autolora(settings: Sequence[Setting]) -> list[Found]:
    """AutoLoRA (arXiv 2403.09113): gates s softmax(alpha) over the R rank-1 parts of each layer,
    alpha trained by first-order bilevel steps on held-out rows; then the plan of the parts with
    the largest R softmax(alpha) over all layers is trained from scratch.

    R is twice the budget's rank, so that the threshold of equal parameters is near the published
    one, 1 / R. A weight step and an architecture step in turn take as many passes as the search of
    one_run does, the training from scratch all others.
    """
    retrainer, rows = settings[0].retrainer, settings[0].rows
    searching = max(1, settings[0].steps_with_search()[1] // 2)
    large = 2 * settings[0].budget_rank
    plan = {name: min(large, most) for name, most in retrainer.capacity.items()}
    parts = [hold_back(s.indices, s.rows.prompts, s.validation_fraction) for s in settings]
    jobs = [
        Retraining(plan, training, s.seed, s.rate, until=searching)
        for s, (training, _) in zip(settings, parts, strict=True)
    ]
    held_out = [
        replace(job, indices=validation) for job, (_, validation) in zip(jobs, parts, strict=True)
    ]
    batches = retrainer.order(held_out, rows, searching)
    plans = len(settings)
    alphas = {
        name: torch.zeros(plans, rank, device=retrainer.device, requires_grad=True)
        for name, rank in plan.items()
    }
    optimizer = torch.optim.Adam(
        alphas.values(), lr=ALPHA_RATE, betas=(0.5, 0.999), weight_decay=1e-3
    )

    def architecture_step(step: int) -> None:
        if step:
            _, gradients = retrainer.gate_gradients(rows.batch(*batches[step - 1]))
            for alpha, gradient in zip(alphas.values(), gradients, strict=True):
                shares = alpha.softmax(-1)
                own = retrainer.scaling * gradient[:, 0, : shares.shape[-1]].float()
                (alpha.grad,) = torch.autograd.grad(shares, alpha, own)
            optimizer.step()
        for name, alpha in alphas.items():
            gates = retrainer.scaling * alpha.detach().softmax(-1)
            retrainer.gates[name][:plans, 0, : plan[name]] = gates.to(retrainer.dtype)

    trained = retrainer.retrain(jobs, rows, between=architecture_step)
    run = {"run_steps": retrainer.training.max_steps - 2 * searching}
    found = []
    for number, (setting, record) in enumerate(zip(settings, trained, strict=True)):
        if record["train_loss"] is None:
            found.append(Found.diverged(setting, DIVERGED))
            continue
        values = {n: plan[n] * alpha.detach()[number].softmax(-1) for n, alpha in alphas.items()}
        kept = largest_values(values, retrainer.shapes, setting.budget)
        own = {name: int((value >= 1).sum()) for name, value in values.items()}
        notes = run | {"own_parameters": parameters(own, retrainer.shapes)}
        found.append(Found({name: int(some.sum()) for name, some in kept.items()}, notes))
    return found
