"""Every option's bounds, and how they are checked: the error names the option, the value and what
would be right. Not here: options that need a model or data to check."""

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from transformers import get_scheduler

from darts_lora import InputError, SearchConfig
from darts_lora.base.bounds import check_bounds
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig


@pytest.mark.parametrize(
    ("config", "option", "value"),
    [
        *[(SearchConfig, "ranks", v) for v in ((), (1, 1), (-1, 2), (1.5,), ("4",), (0,), 4)],
        *[(SearchConfig, "scaling", v) for v in (0, -1.0, float("nan"), "2")],
        *[(SearchConfig, "adapter_dtype", v) for v in ("both", None)],
        *[(SearchConfig, "dropout", v) for v in (-0.1, 1.0, 1.5)],
        *[(SearchConfig, "budget_rank", v) for v in (0, -4, float("inf"))],
        *[(SearchConfig, "budget_parameters", v) for v in (0, 10.5)],
        *[(SearchConfig, "search_fraction", v) for v in (0.0, -1.0, 1.5, "a third")],
        *[(SearchConfig, "arch_every", v) for v in (0, 1.5)],
        (SearchConfig, "seed", -1),
        (ModelConfig, "dtype", "int8"),
        *[(DataConfig, "validation_fraction", v) for v in (0, 1, 1.5)],
        *[(DataConfig, "max_length", v) for v in (0, None, 1.5)],
        *[(TrainingConfig, "max_steps", v) for v in (0, -5, 1.5)],
        (TrainingConfig, "batch_size", 0),
        (TrainingConfig, "learning_rate", 0.0),
        (TrainingConfig, "lr_scheduler", "exponential"),
        (TrainingConfig, "max_grad_norm", -1.0),
        (TrainingConfig, "mixed_precision", "fp8"),
    ],
)
def test_out_of_bounds(config, option, value):
    with pytest.raises(InputError, match=f"^{option}={re.escape(repr(value))}: .*must"):
        config(**{option: value})


def test_two_budgets():
    with pytest.raises(InputError, match="budget_rank=4 and budget_parameters=100: give one"):
        SearchConfig(budget_rank=4, budget_parameters=100)


def test_defaults_hold_and_every_option_has_a_docstring():
    for config in (SearchConfig, ModelConfig, DataConfig, TrainingConfig):
        config()
        body = inspect.getsource(config)
        for field in dataclasses.fields(config):
            assert re.search(rf"    {field.name}: .*\n    \"\"\"", body), field.name
    assert SearchConfig(ranks=[8, 0, 2]).ranks == (0, 2, 8)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_every_scheduler_warms_up(kind, warmup):
    config = TrainingConfig(lr_scheduler=kind, lr_warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(config.scheduler_type, optimizer, warmup, 10)
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[: warmup + 1] == [step / warmup if warmup else 1.0 for step in range(warmup + 1)]
    assert (rates[-1] == 1) == (kind == "constant")


@pytest.mark.parametrize("value", [1e300, 10**400, float("inf"), float("nan")])
def test_numbers_that_nothing_can_be_computed_with_are_refused(value):
    for make in (
        lambda: TrainingConfig(learning_rate=value),
        lambda: SearchConfig(budget_rank=value),
        lambda: SearchConfig(scaling=value),
        lambda: TrainingConfig(max_steps=value),
    ):
        with pytest.raises(InputError) as error:
            make()
        assert len(str(error.value)) < 400


@dataclass
class Options:
    kind: Literal["a", "b"] = "a"
    width: Literal[4, 8] | None = None
    name: str | None = None
    shape: str = "tiny"
    count: int | None = None
    seed: int = 0

    def __post_init__(self):
        check_bounds(self, above={"count": 0}, choices={"shape": ("tiny", "large")})


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"kind": "c"}, "kind='c': must be one of a, b"),
        ({"kind": None}, "kind=None: must be one of a, b"),
        ({"width": 5}, "width=5: must be one of 4, 8, None"),
        ({"shape": "huge"}, "shape='huge': must be one of tiny, large"),
        ({"count": 0}, "count=0: must be an integer > 0"),
        ({"count": True}, "count=True: must be an integer > 0"),
        ({"seed": 2**31}, f"seed={2**31}: must be an integer <= {2**31 - 1}"),
    ],
)
def test_what_is_refused(changed, text):
    with pytest.raises(InputError) as caught:
        Options(**changed)
    assert str(caught.value) == text


def test_what_passes():
    Options()
    Options(kind="b", width=8, name="anything", shape="large", count=1, seed=2**31 - 1)
