"""find_ranks: from a model and two data sets to PEFT's configuration.
Not here: the search itself (test_search.py)."""

import pytest
import torch
from peft import get_peft_model

from darts_lora import InputError, find_ranks
from small_models import residual

FIRST = {"max_steps": 16, "batch_size": 8, "learning_rate": 0.01}


def rows(count):
    x = torch.randn(count, 16)
    return [{"x": row, "y": row.flip(0)} for row in x]


def loss_fn(model, batch):
    return (model(batch["x"]) - batch["y"]).pow(2).mean()


def collate(batch):
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


def search(model, **options):
    options = {"ranks": (0, 1, 2), "budget_rank": 1, **FIRST, **options}
    return find_ranks(model, rows(64), rows(32), loss_fn=loss_fn, data_collator=collate, **options)


def test_it_gives_a_configuration_and_the_model_as_it_was():
    model = residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = search(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    adapted = get_peft_model(model, config)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert 0 < trained <= 4 * 32, "as rank 1 on four layers of 16 -> 16"


def test_a_validation_batch_has_half_of_the_rows():
    sizes = {"train": set(), "validation": set()}

    def noting(batch):
        sizes[batch[0]["split"]].add(len(batch))
        return collate([{name: row[name] for name in "xy"} for row in batch])

    splits = [[row | {"split": name} for row in rows(64)] for name in sizes]
    options = {"ranks": (0, 1, 2), "budget_rank": 1, **FIRST, "batch_size": 8}
    find_ranks(residual(), *splits, loss_fn=loss_fn, data_collator=noting, **options)
    assert sizes == {"train": {8}, "validation": {4}}


def test_an_unknown_option_is_named_and_the_model_left_alone():
    model = residual()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(InputError, match="budget_rnak: is no option; nearest name: budget_rank"):
        search(model, budget_rnak=1)
    with pytest.raises(InputError, match="train_dataset: has no rows"):
        find_ranks(model, [], rows(32), loss_fn=loss_fn, budget_rank=1, ranks=(0, 1), **FIRST)
    assert [name for name, _ in model.named_modules()] == names
