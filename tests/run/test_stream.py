"""BatchStream: endless batches, each epoch in its own order, from any position.
Not here: the search that resumes from one (test_search.py)."""

from functools import partial

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from darts_lora import InputError
from darts_lora.run.stream import BatchStream, check_batches, taken_rows

ROWS, BATCH = 10, 4  # two whole batches and a rest of two rows


def stream(seed=0, drop_last=False):
    # without a generator of its own: opening it draws from the global one
    loader = DataLoader(list(range(ROWS)), BATCH, shuffle=True, drop_last=drop_last)
    settings = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed)
    return BatchStream(Accelerator(cpu=True, dataloader_config=settings).prepare(loader))


def take(batches, count):
    return [next(batches).tolist() for _ in range(count)]


def test_every_epoch_has_each_row_once_in_an_order_of_its_own():
    taken = take(stream(), 9)
    epochs = [[row for batch in taken[i : i + 3] for row in batch] for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_alone_decides_the_order():
    first = take(stream(), 7)
    torch.rand(3)  # the state of the global generator does not matter
    assert take(stream(), 7) == first != take(stream(seed=1), 7)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 2, 3, 4, 6, 8])
def test_move_to_goes_on_exactly_where_another_stopped(taken, drop_last):
    whole = stream(drop_last=drop_last)
    take(whole, taken)
    position, random = whole.position, torch.get_rng_state()
    expected, drawn = take(whole, 6), torch.rand(1)
    moved = stream(drop_last=drop_last)
    moved.move_to(list(position))  # as a checkpoint gives it back
    assert moved.position == position
    torch.set_rng_state(random)
    assert take(moved, 6) == expected and torch.rand(1) == drawn, "as many random numbers"
    assert moved.position == whole.position


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batches", [1, 2, 3, 4, 5, 7])
def test_which_rows_an_epoch_has_given_is_known_before(batches, drop_last):
    known = taken_rows(stream(drop_last=drop_last).dataloader, batches)
    given = take(stream(drop_last=drop_last), batches)
    length = 2 if drop_last else 3
    begun = (batches - 1) // length * length
    assert known == [row for batch in given[begun:] for row in batch]


def test_the_position_counts_epochs_and_batches():
    batches = stream()
    positions = []
    for _ in range(4):
        next(batches)
        positions.append(batches.position)
    assert positions == [(0, 1), (0, 2), (0, 3), (1, 1)]


@pytest.mark.parametrize("taken", [1, 2])
def test_generators_restored_after_move_to_stay_as_they_were(taken):
    """Samples of the search are drawn from the global generator: batches must not use it then."""
    moved = stream()
    moved.move_to((0, taken))
    before = torch.get_rng_state()
    next(moved)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loader_without_a_batch_for_each_process(monkeypatch):
    PartialState()
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    prepare = partial(prepare_data_loader, num_processes=2, process_index=1)
    whole = DataLoader(range(2 * BATCH), BATCH, drop_last=True)
    check_batches("train", whole, prepare(whole))
    for split, other in (("train", "lower"), ("validation", "raise")):
        few = DataLoader(range(2 * BATCH - 1), BATCH, drop_last=True)
        text = f"num_processes=2, batch_size=4: the {split} split has a whole batch for 1 of"
        with pytest.raises(InputError, match=f"^{text} .*, or {other} validation_fraction$"):
            check_batches(split, few, prepare(few))
    few = DataLoader(range(1), BATCH)  # filled up by accelerate
    check_batches("train", few, prepare(few))
