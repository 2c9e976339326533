"""Which of the steps is taken, and in how many passes. Not here: what a step computes."""

import torch
from accelerate import Accelerator

from darts_lora import SearchConfig, Supernet
from darts_lora.architect import LAST
from darts_lora.config import TrainingConfig
from darts_lora.run.bilevel import BilevelStep
from small_models import residual


def make(accelerator=None, steps=4, **options):
    supernet = Supernet(
        residual(), SearchConfig(ranks=(0, 1, 2), **{"search_fraction": 1, **options})
    )
    passes = []
    supernet.model.register_forward_pre_hook(lambda model, args: passes.append(len(args[0])))
    training = TrainingConfig(steps, gradient_accumulation_steps=2)

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
    train, val = (iter(torch.randn(40, 4, 16)) for _ in range(2))
    alpha = steps.supernet.alpha.detach().clone()
    for step in range(1, 5):
        seen.clear()
        loss, metrics = steps.step(train, val)
        due = step == 4  # every second of the second half
        assert loss > 0 and (metrics is None) != due
        assert torch.equal(steps.supernet.alpha, alpha) == (step < 4)
        assert steps.architect.mean.steps == step, "all steps are in the mean"
    own = LAST * 3  # before, directions, cut
    assert seen == [4] * (2 + 1 + own) and metrics.keys() == {"gain", "expected_parameters"}
    assert len(list(train)) == 40 - 8 and len(list(val)) == 40 - 1 - LAST


def test_the_search_may_be_a_part_of_the_run():
    assert make(steps=8, search_fraction=0.5)[0].architect.steps == 4
