"""Which of the steps is taken, in how many passes; batches of unlike numbers of learnt tokens: each
token counts alike, as in one large batch. Not here: what a step computes, batches that count alike
(test_search.py), several processes (test_processes.py)."""

import itertools

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from darts_lora import RankSearch, SearchConfig, Supernet, TrainingConfig
from darts_lora.architect import LAST
from darts_lora.run.bilevel import BilevelStep
from darts_lora.run.tokens import learnt_tokens, model_loss
from small_models import Residual, randomise, residual

WIDTH, TOKENS = 16, 9


class Tagger(Residual):
    """Rows of token vectors; the mean loss of the labels of the following tokens."""

    def forward(self, x, labels):
        logits = super().forward(x)
        return {"loss": token_loss(logits, labels), "logits": logits}


def token_loss(logits, labels):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def rows(learnt, seed=0):
    """One row for each number of learnt tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for count in learnt:
        labels = torch.randint(WIDTH, (TOKENS,), generator=generator)
        labels[: TOKENS - count] = -100
        made.append({"x": torch.randn(TOKENS, WIDTH, generator=generator), "labels": labels})
    return made


def search(data, batch_size, parts, loss_fn=model_loss):
    torch.manual_seed(0)
    options = {"ranks": (0, 1, 2), "budget_rank": 1}
    supernet = Supernet(Tagger(WIDTH), SearchConfig(**options))
    randomise(supernet)
    loader = DataLoader(data, batch_size=batch_size)
    options = {"max_steps": 4, "gradient_accumulation_steps": parts}
    made = RankSearch(
        supernet,
        loader,
        loader,
        training=TrainingConfig(**options),
        loss_fn=loss_fn,
    )
    made.weights.update = lambda: None  # the gradients stay
    return made


def gradients(*args, **options):
    made = search(*args, **options)
    loss = made.weights.step(itertools.cycle(made.train_stream.dataloader))
    return [loss, *[w.grad for w in made.supernet.weight_parameters()]]


@pytest.mark.parametrize("learnt", [(3, 3), (1, 7), (8, 1, 2, 5)])
def test_accumulated_batches_weigh_tokens_alike(learnt):
    data = rows(learnt)
    whole, parts = gradients(data, len(data), 1), gradients(data, 1, len(data))
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_losses_of_ones_own_weigh_batches_alike():
    data = rows((1, 7))
    mine = lambda model, batch: model_loss(model, batch)  # noqa: E731
    whole, parts = gradients(data, 2, 1), gradients(data, 1, 2, loss_fn=mine)
    assert not torch.allclose(whole[0], parts[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ({"labels": torch.tensor([[5, -100, 2, 3], [-100, -100, 1, -100]])}, 3),
        ({"labels": torch.tensor([3, 1, 2])}, 3),
        ({"labels": [3, 1]}, None),
        ({"x": torch.ones(2)}, None),
        ((torch.ones(2), torch.ones(2)), None),
    ],
)
def test_what_a_loss_is_the_mean_of(batch, count):
    found = learnt_tokens(batch)
    assert (found if found is None else int(found)) == count


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
    own = LAST * (3 + len(steps.supernet.sizes))  # before, directions, cut, those of all sizes
    assert len(steps.supernet.sizes) > 1, "no budget: the base model and each rank"
    assert seen == [4] * (2 + 1 + own) and metrics.keys() == {"gain", "expected_parameters"}
    assert len(list(train)) == 40 - 8 and len(list(val)) == 40 - 1 - LAST


def test_the_search_may_be_a_part_of_the_run():
    assert make(steps=8, search_fraction=0.5)[0].architect.steps == 4
