"""Which of the steps is taken, and in how many passes. Not here: what a step computes."""

import torch
from accelerate import Accelerator

from darts_lora import SearchConfig, Supernet
from darts_lora.config import TrainingConfig
from darts_lora.run.bilevel import BilevelStep
from small_models import residual


def make(accelerator=None, **options):
    supernet = Supernet(residual(), SearchConfig(ranks=(0, 1, 2), **options))
    passes = []
    supernet.model.register_forward_pre_hook(lambda model, args: passes.append(len(args[0])))
    training = TrainingConfig(gradient_accumulation_steps=2)

    def loss_fn(model, batch):
        return model(batch).pow(2).mean()

    accelerator = accelerator or Accelerator(cpu=True)
    return BilevelStep(supernet, accelerator, training, loss_fn), passes


def test_both_steps_scale_their_losses_alike():
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")  # what fp16 has on a GPU
    assert make(accelerator)[0].architect.scaler is accelerator.scaler
    assert make()[0].architect.scaler is None


def test_passes_of_a_step():
    steps, seen = make()
    train, val = (iter(torch.randn(4, 4, 16)) for _ in range(2))
    alpha = steps.supernet.alpha.detach().clone()
    loss, metrics = steps.step(train, val, trains_alpha=False)
    assert seen == [4, 4] and metrics is None and loss > 0
    assert steps.architect.mean.steps == 1, "the warm-up is in the mean"
    assert torch.equal(steps.supernet.alpha, alpha)
    seen.clear()
    loss, metrics = steps.step(train, val, trains_alpha=True)
    assert seen == [4, 4, 4] and {"loss", "gradient_norm"} <= metrics.keys()
    assert not torch.equal(steps.supernet.alpha, alpha)
    assert len(list(train)) == 0 and len(list(val)) == 3
