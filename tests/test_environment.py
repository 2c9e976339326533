"""accelerate's environment variables: none changes what a search computes, bad ones are one line.
Not here: what a resumed search compares of them (test_resume.py)."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_search import make

from darts_lora import InputError
from darts_lora.environment import check_accumulation, explained


@pytest.fixture
def variables(monkeypatch):
    """Set variables for an accelerator that is made anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda **values: [monkeypatch.setenv(*pair) for pair in values.items()]
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accumulation_by_a_variable_divides_no_loss(variables):
    plain = make()
    plain.run()
    variables(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="7")
    search = make()
    search.run()
    assert torch.equal(search.supernet.alpha, plain.supernet.alpha)
    weights = zip(
        search.supernet.weight_parameters(), plain.supernet.weight_parameters(), strict=True
    )
    assert all(torch.equal(*pair) for pair in weights)


def test_an_accelerator_that_divides_losses_is_refused():
    check_accumulation(Accelerator())
    with pytest.raises(InputError, match=r"gradient_accumulation_steps=3 of the accelerator"):
        check_accumulation(Accelerator(gradient_accumulation_steps=3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "no such"),
        ("ACCELERATE_USE_CPU", "perhaps"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "many"),
    ],
)
def test_a_bad_variable_is_one_line(variables, name, value):
    variables(**{name: value})
    told = r"^accelerate cannot start \(.*ACCELERATE_\*"
    with pytest.raises(InputError, match=told), explained():
        Accelerator()
