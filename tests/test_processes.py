"""A search in two gloo processes, under DDP and under FSDP2: what is shared, what is equal.
Not here: what the processes do (two_processes.py), the recipe (recipes/test_search.py)."""

import json
from pathlib import Path

import forked
import pytest
import torch

from darts_lora.architect import LAST


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of the two processes saw."""
    folder = tmp_path_factory.mktemp("processes")
    script = Path(__file__).with_name("two_processes.py")
    done = forked.run(script, folder, folder=folder, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{process}.json").read_text()) for process in (0, 1)]


def test_two_processes_share_rows_and_alpha_but_not_places(seen):
    first, second = (process["shared"] for process in seen)
    assert first["processes"] == second["processes"] == 2
    assert first["model"] == "DistributedDataParallel"
    epoch = [row for process in (first, second) for batch in process["rows"][:2] for row in batch]
    assert len(epoch) == len(set(epoch)) == 32, "no row twice before all were seen"
    assert first["gates"] != second["gates"]
    assert first["alpha"] == second["alpha"] and first["weights"] == second["weights"]
    assert any(value != 0 for layer in first["alpha"] for value in layer)


def test_processes_of_a_trainer_draw_places_of_their_own_on_rows_of_their_own(seen):
    first, second = (process["trainer"] for process in seen)
    assert len(first["gates"]) == 2 + 1 + 3 * LAST and first["alpha"] == second["alpha"]
    assert first["gates"][:2] == second["gates"][:2], "a weight step trains the mean"
    assert first["gates"][2] != second["gates"][2], "an architecture step draws"
    assert first["gates"][3:] == second["gates"][3:], "the last measurement draws nothing"
    for one, other in zip(first["rows"][:2], second["rows"][:2], strict=True):
        assert not set(one) & set(other), "an epoch of the evaluation rows is two batches of each"


@pytest.mark.parametrize("kind", ["joined", "tokens"])
def test_gradients_are_those_of_one_process_on_the_joined_batch(seen, kind):
    for process in seen:
        differences, sizes = process[kind]["differences"], process[kind]["sizes"]
        assert len(sizes) >= 8 + 3 and min(sizes) > 1e-3, "4 layers with A and B, and gates"
        assert all(d <= 1e-6 * max(s, 1) for d, s in zip(differences, sizes, strict=True))


def test_layers_without_a_gradient_are_those_of_one_process(seen):
    """As a vision layer behind the one that LLaVA reads, or all of them on rows without images."""
    for process in seen:
        for step, used in zip(process["resting"], ([0, 1, 2], [1, 2]), strict=True):
            resting = [[i not in used] * 2 for i in range(4) for _ in "AB"]
            assert step["none"] == resting, "no zeros either: AdamW would decay these weights"
            differences, sizes = step["differences"], step["sizes"]
            assert min(sizes) > 1e-3
            assert all(d <= 1e-6 * max(s, 1) for d, s in zip(differences, sizes, strict=True))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_resumed_search_ends_as_one_in_one_go(seen, kind):
    (whole,) = {json.dumps(process[kind]["whole"]) for process in seen}
    (resumed,) = {json.dumps(process[kind]["resumed"]) for process in seen}
    assert whole == resumed
    assert json.loads(whole)["processes"] == 2


def test_sharded_weights_train_as_whole_ones(seen):
    ddp, fsdp2 = seen[0]["ddp"], seen[0]["fsdp2"]
    assert ddp["sharded"] == 0 and fsdp2["sharded"] == 8, "A and B of four layers"
    assert ddp["gathered_ahead"] == [] and fsdp2["gathered_ahead"] == [0, 1, 1, 1, 0]
    for part in ("alpha", "weights"):
        one, other = (torch.tensor(found["whole"][part]) for found in (ddp, fsdp2))
        assert one.abs().max() > 1e-2
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    for one, other in zip(ddp["metrics"], fsdp2["metrics"], strict=True):
        assert one["gradient_norm"] > 0.05, "clipping has something to do"
        for name in ("train_loss", "gradient_norm", "validation_gain"):
            if one[name] is None:
                continue  # before the second half
            assert one[name] == pytest.approx(other[name], abs=1e-5)


def test_sharded_weights_are_handed_over_as_whole_ones(seen):
    """The same ranks and the same adapter, in each process."""
    for kind in ("ddp", "fsdp2"):
        first, second = (process[kind] for process in seen)
        assert all(first.get(part) == second.get(part) for part in ("ranks", "file", "own"))
    ddp, fsdp2 = seen[0]["ddp"], seen[0]["fsdp2"]
    assert ddp["ranks"] == fsdp2["ranks"] and any(ddp["ranks"].values())
    assert ddp["own"] == ddp["file"], "what one process hands over is what files hand over"
    for name, product in ddp["file"].items():
        one, other = torch.tensor(product), torch.tensor(fsdp2["file"][name])
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_handover_in_a_trainer_of_several_processes_is_refused(seen):
    text = "num_processes=2: a handover inside a Trainer has one; set search_fraction=1"
    assert all(process["handover in a trainer"].startswith(text) for process in seen)


def test_all_stop_at_the_same_step_when_one_is_asked_to(seen):
    assert [process["stop"] for process in seen] == 2 * [{"status": 143, "step": 2}]


def test_alphas_that_differ_are_an_error_at_the_next_checkpoint(seen):
    for process in seen:
        assert process["diverge"].startswith("num_processes=2: alpha differs between processes")
        assert "at step 4: stopped" in process["diverge"]
