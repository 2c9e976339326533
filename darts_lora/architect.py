"""Architect: the architecture step, and alpha's descent on its gradient.
Not here: alpha in proportion to worth (allocation.py), the weight step, the loop, logging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from darts_lora.alpha.allocation import Allocation
from darts_lora.alpha.average import RunningMean
from darts_lora.alpha.prior import Prior
from darts_lora.base.errors import DivergedError, InputError
from darts_lora.supernet import Supernet

AVERAGE = 0.125  # the default of arch_average
SHRINK = 0.02  # of the expected parameters, the most that one step takes off towards the budget


class Architect:
    """Trains alpha on validation batches (DARTS, arXiv 1806.09055, eq. 3 to 6).

    `step` touches alpha and what moves it. The LoRA weights, their gradients and their
    optimizer come out of it bit for bit as they went in. With arch_average its gradient is taken at
    the running mean of the weights: what a rank is worth where they would settle, not amid the
    noise of their last steps, in which ranks seem to be worth little while the rate is high.

    With arch_update "proportional" the gradient says what each layer is worth, and alpha shares the
    budget accordingly (allocation.py). With "gradient" alpha descends on the loss; under a budget
    every step of its optimizer, which knows the loss alone, is followed by one
    against the gradient of the expected parameters, onto the bound (gradient projection, Rosen
    1960): that which was, less 2 %, until it is the budget. So the price of a parameter needs no
    weight and no memory that could outlast its reason, and does not slow what the loss teaches.

    Args:
        supernet: whose alphas are trained; its config gives learning rate, betas and decay.
        reduce: averages a gradient over processes, Tensor -> Tensor; None for one process.
        scaler: of the weights' losses in float16; alpha's are scaled alike, or small gradients
            would be 0. One that overflows counts as 0. None: no scaling.
        check_finite: look at each gradient before alpha takes it, which waits for the device; a
            caller that looks at the losses itself, now and then, needs no such waits.

    Attributes:
        allocation: sets alpha (arch_update "proportional"), which begins even; None: it descends.
        graphed: batch -> loss and gradients, in place of loss_fn (graphs.py).
        prior: makes of every gradient of alpha what alpha moves by (prior.py).
        mean: of the weights (average.py). `step` takes in the weights as they are; call its
            `update` behind weight steps that no architecture step follows, as in a warm-up.
        gradient_sums: (2, N, K), the loss's gradients of alpha summed over even and odd steps.
    """

    def __init__(
        self,
        supernet: Supernet,
        *,
        reduce: Callable[[Tensor], Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        check_finite: bool = True,
    ):
        config, self.scaler, self.check_finite = supernet.config, scaler, check_finite
        self.supernet, self.reduce = supernet, reduce
        self.optimizer = SharedAdam(
            [supernet.alpha],
            lr=config.arch_learning_rate,
            betas=config.arch_betas,
            weight_decay=config.arch_weight_decay,
        )
        self.graphed: Callable[[Any], tuple[Tensor, list[Tensor]]] | None = None
        self.prior = Prior(list(supernet.layers), config.arch_noise, supernet.unit_costs)
        average = config.arch_average
        if average is None:
            average = AVERAGE
        self.mean = RunningMean(supernet.weight_parameters, average)
        self.allocation = None
        if supernet.arch_update == "proportional":
            self.allocation = Allocation(supernet, self.prior)
        self.steps = 0
        self.gradient_sums = torch.zeros(2, *supernet.alpha.shape)

    def step(self, loss_fn: Callable[[Any], Tensor], batch: Any) -> dict[str, Tensor]:
        """One step of alpha.

        Args:
            loss_fn: batch -> scalar loss of the supernet's model.
            batch: of the validation split.

        Returns:
            "loss" on the validation batch, "gradient_norm" (of the loss's gradient of all alphas)
            and "expected_parameters" after the step, scalars on the device.

        Raises:
            InputError: a loss that does not depend on alpha.
            DivergedError: a gradient that is infinite or NaN; alpha stays as it was.
        """
        self.mean.update()
        with self.mean.in_place():
            if self.graphed is not None:
                loss, (gradient,) = self.graphed(batch)
            else:
                loss, (gradient,) = self.gradients(loss_fn, batch)
        return self.update(loss, gradient)

    def update(self, loss: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        """The part of `step` behind the gradient of the validation loss, (N, K); its result.

        Raises:
            DivergedError: as of `step`.
        """
        if self.check_finite:
            gradient = gradient + 0 * loss  # one process's NaN stops all of them
        if self.reduce is not None:
            gradient = self.reduce(gradient)
        if self.scaler is not None and not gradient.isfinite().all():
            gradient = torch.zeros_like(gradient)  # weight steps overflow too, and lower the scale
        if self.check_finite and not gradient.isfinite().all():
            raise DivergedError(
                f"the gradient of alpha is infinite or NaN (validation loss {float(loss):.4g}): "
                "alpha was left as it was; lower the learning rate, or look at the data"
            )
        self.gradient_sums = self.gradient_sums.to(gradient.device)
        self.gradient_sums[self.steps % 2] += gradient
        self.steps += 1
        if self.allocation is not None:
            self.allocation.update(self.gradient_sums)
        else:
            self._descend(gradient)
        return {
            "loss": loss,
            "gradient_norm": gradient.norm(),
            "expected_parameters": self.supernet.expected_parameters().detach(),
        }

    def gradients(
        self, loss_fn: Callable[[Any], Tensor], batch: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss on the batch and [its gradient of alpha, (N, K)]; nothing is changed. Rows may
        reach no layer, as text does where images are searched: that is a gradient of 0."""
        alpha, scale = self.supernet.alpha, 1.0
        if self.scaler is not None:
            scale = self.scaler.get_scale()
        with self.supernet.arch_gradients(weights=False):
            calls = self.supernet.calls
            loss = loss_fn(batch)
            gradient = None
            if loss.requires_grad:
                (gradient,) = torch.autograd.grad(loss * scale, [alpha], allow_unused=True)
        if gradient is None and (self.supernet.calls == calls or not loss.requires_grad):
            raise InputError(
                "loss_fn: its loss does not depend on alpha; compute it from what the "
                "supernet's own model gives, without detach, item or torch.no_grad"
            )
        gradient = torch.zeros_like(alpha) if gradient is None else gradient / scale
        return loss.detach(), [gradient]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed search needs: tensors and plain numbers."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "gradient_sums": self.gradient_sums,
            "mean": self.mean.values,
            "mean_steps": self.mean.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.gradient_sums = state["steps"], state["gradient_sums"]
        self.mean.load(state["mean"], state["mean_steps"])

    def _descend(self, gradient: Tensor) -> None:
        """A step of alpha's optimizer, and the projection onto the budget."""
        before = self.supernet.expected_parameters().detach()
        smooth = self.prior.posterior(self.gradient_sums)
        self.supernet.alpha.grad = smooth(gradient)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.supernet.budget is not None:
            self._project(((1 - SHRINK) * before).clamp_min(self.supernet.budget), smooth)

    def _project(self, bound: Tensor, smooth: Callable[[Tensor], Tensor]) -> None:
        """Move alpha so that the expected parameters are within the bound, to first order and by at
        most 1: what a step lacks, the next one makes up."""
        alpha = self.supernet.alpha
        expected = self.supernet.expected_parameters()
        (slope,) = torch.autograd.grad(expected, alpha)
        direction = smooth(slope)  # one metric for loss and cost, or the best within is elsewhere
        excess = (expected.detach() - bound).clamp_min(0)
        step = excess / (slope * direction).sum().clamp_min(1e-12) * direction
        with torch.no_grad():
            alpha -= step / step.abs().max().clamp_min(1)  # decided alphas have hardly a slope


class SharedAdam(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980) with one second moment for all entries of a tensor, the mean of their
    squares: each moves in proportion to its own gradient.

    With second moments of their own, entries move by their signal over their noise: the alphas of
    layers that hardly matter go as far as those of layers that the loss depends on, and their
    probabilities say which ranks are certain, not which are worth their parameters.

    Args:
        params: as of any optimizer.
        lr: learning rate.
        betas: decay of the means of the gradient and of its square, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: times the parameter, added to its gradient (as in Adam, not as in AdamW).
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        """One step on the gradients at hand."""
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter.sum())
                gradient = parameter.grad + group["weight_decay"] * parameter
                state["step"] += 1
                state["exp_avg"].lerp_(gradient, 1 - first)
                state["exp_avg_sq"].lerp_(gradient.square().mean(), 1 - second)
                steps = int(state["step"])  # on the CPU
                root = (state["exp_avg_sq"] / (1 - second**steps)).sqrt()
                size = group["lr"] / (1 - first**steps)
                parameter.sub_(size * state["exp_avg"] / (root + group["eps"]))
