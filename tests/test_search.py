"""The loop: which batch trains what, the same seed twice, resume, errors, what is written.
Not here: a single architecture step (test_architect.py), the recipe (recipes/test_search.py)."""

import dataclasses
import itertools
import json
import math
import os
import re
import resource
import signal
import sys
import time
from functools import partial
from unittest import mock

import pytest
import torch
import torch.utils.tensorboard
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, TensorDataset

from darts_lora import (
    DivergedError,
    Genotype,
    InputError,
    RankSearch,
    SearchConfig,
    Supernet,
    discretize,
)
from darts_lora.alpha.sizes import recommended
from darts_lora.base.interruption import Stopped
from darts_lora.config import TrainingConfig
from darts_lora.run.checkpoint import checkpoints, load_checkpoint
from darts_lora.run.resume import remove_search
from darts_lora.run.tokens import model_loss
from small_models import residual

WIDTH = 16


def split(rows, first, seed):
    """Rows of (number, input, target): the numbers of two splits differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=generator)
    with torch.no_grad():
        target = residual(WIDTH, seed=7)(x)
    return TensorDataset(torch.arange(first, first + rows), x, target)


def loader(rows=40, first=0, seed=0, batch_size=8, shuffle=True):
    generator = torch.Generator().manual_seed(seed)
    data = split(rows, first, seed)
    return DataLoader(data, batch_size, shuffle=shuffle, drop_last=True, generator=generator)


def loss_fn(model, batch):
    return (model(batch[1]) - batch[2]).pow(2).mean()


def make(output_dir=None, loss=loss_fn, train=None, course=None, model=None, **options):
    names = TrainingConfig.__dataclass_fields__
    training = {key: options.pop(key) for key in list(options) if key in names}
    training = {"max_steps": 12, "learning_rate": 0.01, "logging_steps": 4, **training}
    whole = {"search_fraction": 1.0, "arch_every": 1}
    config = SearchConfig(**{"ranks": (0, 1, 2, 4), "budget_rank": 2, **whole, **options})
    return RankSearch(
        Supernet(residual(WIDTH) if model is None else model, config),
        loader() if train is None else train,
        loader(first=1000, seed=1),
        training=TrainingConfig(**training),
        output_dir=None if output_dir is None else str(output_dir),
        loss_fn=loss,
        course=course,
    )


def snapshot(search):
    """Weights and the state of their optimizer."""
    weights = search.supernet.weight_parameters()
    states = [search.weights.optimizer.state[w] for w in weights]
    kept = [value for state in states for value in state.values()]
    assert len(kept) == 3 * len(weights)
    return [tensor.detach().clone() for tensor in [*weights, *kept]]


def test_no_validation_sample_ever_enters_a_weight_step():
    seen = {"weights": set(), "alpha": set()}
    search = None

    def recording(model, batch):
        step = "weights" if search.supernet._probe is None else "alpha"
        seen[step] |= set(batch[0].tolist())
        return loss_fn(model, batch)

    search = make(loss=recording)
    architecture_steps = []
    step_of_alpha = search.architect.step

    def watched(loss, val_batches):
        before = snapshot(search)
        metrics = step_of_alpha(loss, val_batches)
        assert all(torch.equal(b, a) for b, a in zip(before, snapshot(search), strict=True))
        architecture_steps.append(metrics)
        return metrics

    search.architect.step = watched
    search.run()
    assert [m is not None for m in architecture_steps] == 6 * [False] + 6 * [True]
    assert max(seen["weights"]) < 1000
    assert min(seen["alpha"]) >= 1000


@pytest.mark.filterwarnings("error:Detected call of `lr_scheduler.step")
def test_alpha_rests_in_the_first_half_and_in_every_weight_step():
    search = make()
    alphas, weight_step = [], search.weights.step

    def watched(batches):
        before = search.supernet.alpha.detach().clone()
        result = weight_step(batches)
        assert torch.equal(search.supernet.alpha, before)
        assert search.supernet.alpha.grad is None
        alphas.append(before)
        return result

    search.weights.step = watched
    search.run()
    assert all(torch.equal(alpha, alphas[0]) for alpha in alphas[:7])
    assert all(not torch.equal(*pair) for pair in itertools.pairwise(alphas[6:]))
    expected = alphas[0].softmax(-1) @ torch.tensor([0.0, 1.0, 2.0, 4.0])
    torch.testing.assert_close(expected, torch.full((4,), 2.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_a_search_is_the_first_part_of_a_run(fraction):
    search = make(search_fraction=fraction, max_steps=20)
    genotype = search.run()
    assert search.step == search.architect.taken == 20 * fraction
    assert len(search.architect.measured.gains) == math.ceil(10 * fraction)
    assert genotype.found_by["verdict"]["early"] == (10 * fraction < 8)


def planted(rows=2048, width=32):
    """A base model, and rows of one that differs from it by ranks 16, 4, 4 and 8 of 32."""
    model, other = (residual(width, seed=3) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block, rank in zip(other.blocks, (16, 4, 4, 8), strict=True):
            up, down = (
                torch.linalg.qr(torch.randn(width, rank, generator=generator))[0] for _ in "ud"
            )
            block.weight += up @ down.T
        x = torch.randn(rows, width, generator=generator)
        return model, TensorDataset(torch.arange(rows), x, other(x))


def test_default_options_find_what_is_planted():
    """The budget is what the planted ranks take: 32 of 4 x 8."""
    model, data = planted()
    train, validation = torch.utils.data.random_split(
        data, [1536, 512], torch.Generator().manual_seed(0)
    )
    search = RankSearch(
        Supernet(model, SearchConfig(budget_rank=8)),
        DataLoader(train, 64, shuffle=True),
        DataLoader(validation, 64, shuffle=True),
        training=TrainingConfig(max_steps=2400, learning_rate=5e-3),
        loss_fn=loss_fn,
    )
    genotype = search.run()
    assert list(genotype.ranks.values()) == [16, 4, 4, 8]
    verdict = genotype.found_by["verdict"]
    assert verdict["learnt"] and verdict["chance"] <= 0.01
    assert genotype.num_parameters == 32 * 64


def test_without_a_budget_the_recommended_size_is_searched(tmp_path):
    """Its genotype is that of a search at that budget, and a resumed search ends alike."""
    options = {"budget_rank": None}
    search = make(max_steps=16, output_dir=tmp_path, **options)
    genotype = search.run()
    sizes = genotype.found_by["sizes"]
    best = recommended(sizes)
    assert genotype.found_by["budget_parameters"] == best["parameters"] == search.supernet.budget
    assert 0.9 * best["parameters"] < genotype.num_parameters <= best["parameters"]
    assert genotype.found_by["verdict"]["budget_parameters"] == best["parameters"]
    expected = [
        sum(p * n for p, n in zip(row, genotype.candidates, strict=True)) * sum(shape)
        for row, shape in zip(
            genotype.probabilities.values(), genotype.shapes.values(), strict=True
        )
    ]
    assert sum(expected) == pytest.approx(best["parameters"], rel=1e-4), "alpha is of that budget"
    for tolerance in (0.0, 0.5):
        derived = discretize(genotype, tolerance=tolerance)
        size = recommended(sizes, tolerance)["parameters"]
        assert derived == dataclasses.replace(
            discretize(genotype, budget_parameters=size),
            found_by=derived.found_by,
        )
        assert derived.found_by["sizes"] == sizes | {"tolerance": tolerance}
    (tmp_path / "genotype.json").unlink()
    again = make(max_steps=16, output_dir=tmp_path, **options).run(resume=True)
    assert again == genotype == Genotype.load(tmp_path / "genotype.json")


def test_a_search_that_is_too_short_for_sizes_takes_half_of_the_largest():
    genotype = make(max_steps=8, budget_rank=None).run()
    assert genotype.found_by["sizes"] is None
    assert genotype.found_by["budget_parameters"] == 2 * sum(map(sum, genotype.shapes.values()))


def test_the_same_seed_gives_the_same_genotype_twice(tmp_path):
    genotypes = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(len(genotypes))  # what the caller drew before must not matter
        make(tmp_path / name, seed=seed).run()
        genotypes.append(Genotype.load(tmp_path / name / "genotype.json"))
    assert genotypes[0] == genotypes[1]
    assert genotypes[0].probabilities != genotypes[2].probabilities


class Killed(Exception):
    """What ends a search as a kill would."""


def at_call(count, act):
    """loss_fn that acts before its call of this number."""
    calls = itertools.count(1)

    def loss(model, batch):
        if next(calls) == count:
            act()
        return loss_fn(model, batch)

    return loss


@pytest.mark.parametrize(("call", "saved"), [(4, 2), (8, 6), (14, 8), (20, 10)])
def test_a_resumed_search_ends_as_one_in_one_go(tmp_path, call, saved):
    """From the first half, from its end, from the second half; killed in the last measurement."""
    options = {"save_steps": 2, "dropout": 0.1}
    whole = make(tmp_path / "whole", **options).run()

    def kill():
        raise Killed

    with pytest.raises(Killed):  # steps 7 and on call twice
        make(tmp_path / "cut", loss=at_call(call, kill), **options).run()
    state, _ = load_checkpoint(str(tmp_path / "cut"))
    architect = state["architect"]
    assert (state["step"], len(architect["gains"])) == (saved, max(saved - 6, 0))
    assert bool(architect["half"]) == (saved >= 6)
    resumed = make(tmp_path / "cut", **options).run(resume=True)
    assert resumed == whole
    of_whole, of_cut = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "cut")
    )
    assert [record["step"] for record in of_whole] == [record["step"] for record in of_cut]
    seconds = [record["seconds"] for record in of_cut]
    assert seconds == sorted(seconds), "a resumed search's time goes on"
    clock = {"seconds": 0, "samples_per_second": 0}
    assert {**of_whole[-1], **clock} == {**of_cut[-1], **clock}


def test_a_search_stopped_between_two_architecture_steps_records_what_one_in_one_go_does(tmp_path):
    options = {"arch_every": 5, "logging_steps": 1}
    whole = make(tmp_path / "whole", **options).run()
    with pytest.raises(Stopped):  # behind step 8: architecture steps are the seventh and the last
        make(tmp_path / "cut", loss=at_call(9, ask_to_stop), **options).run()
    assert make(tmp_path / "cut", **options).run(resume=True) == whole
    clock = {"seconds": 0, "samples_per_second": 0}
    of_whole, of_cut = (
        [{**json.loads(line), **clock} for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "cut")
    )
    assert of_whole == of_cut


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (None, 75)]
)
def test_a_search_that_is_asked_to_stop_goes_on_later(
    tmp_path, capsys, monkeypatch, number, status
):
    whole = make(tmp_path / "whole", dropout=0.1).run()

    def ask():
        if number is None:  # two minutes go by
            now = time.monotonic()
            monkeypatch.setattr(time, "monotonic", lambda: now + 120)
        else:
            os.kill(os.getpid(), number)

    folder = tmp_path / "stopped"
    search = make(folder, loss=at_call(8, ask), dropout=0.1, max_runtime=None if number else 1.5)
    with pytest.raises(Stopped) as stopped:  # in step 7, in the architecture step behind it
        search.run()
    assert stopped.value.code == status and search.step == 7
    assert [os.path.basename(path) for path in checkpoints(str(folder))] == ["step-0000007"]
    told = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    reason = "max_runtime=1.5 minutes are over" if number is None else number.name
    assert told == [
        f"{reason}: stopped after step 7 of 12; the last checkpoint is "
        f"{folder}/checkpoints/step-0000007, --resume goes on from it"
    ]
    assert make(folder, dropout=0.1).run(resume=True) == whole


def test_a_request_in_the_last_step_comes_too_late(tmp_path):
    search = make(tmp_path, max_steps=2, loss=at_call(3, ask_to_stop))
    assert search.run() == Genotype.load(tmp_path / "genotype.json")


def ask_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


def test_an_unfinished_search_is_not_overwritten_and_a_finished_one_leaves_nothing(tmp_path):
    with pytest.raises(Stopped):
        make(tmp_path, loss=at_call(5, ask_to_stop)).run()
    with pytest.raises(
        InputError, match=r"an unfinished search is there \(step 5 of 12\); go on w"
    ):
        make(tmp_path, seed=1).run()
    make(tmp_path).run(resume=True)
    results = [tmp_path / "genotype.json", tmp_path / "supernet.safetensors"]
    assert all(path.exists() for path in results)
    results[0].rename(tmp_path / "kept")  # as one that was killed before it could write this
    with pytest.raises(InputError, match=r"an unfinished search is there \(step 12 of 12\); go on"):
        make(tmp_path, seed=1).run()
    make(tmp_path).run(resume=True)
    assert results[0].read_bytes() == (tmp_path / "kept").read_bytes()
    with pytest.raises(Stopped):
        make(tmp_path, seed=1, loss=at_call(5, ask_to_stop)).run()
    assert not any(path.exists() for path in results)
    assert [os.path.basename(path) for path in checkpoints(str(tmp_path))] == ["step-0000005"]


def run_out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("save_steps", [4, 0])
def test_no_memory_left_names_the_last_checkpoint(tmp_path, save_steps):
    search = make(tmp_path, loss=at_call(9, run_out_of_memory), save_steps=save_steps)
    left = r"step-0000004, --resume goes on" if save_steps else "no checkpoint was written"
    with pytest.raises(InputError, match=rf"^out of memory .*lower batch_size .*{left}"):
        search.run()


class Dying(TensorDataset):
    """Rows of which one kills the data worker that reads it."""

    def __getitem__(self, row):
        if row == 37:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(row)


def test_a_data_worker_that_dies_names_the_last_checkpoint(tmp_path):
    train = DataLoader(Dying(*split(40, 0, 0).tensors), 8, num_workers=1)
    with pytest.raises(InputError) as error:
        make(tmp_path, train=train, save_steps=1).run()
    error = str(error.value)
    assert re.search(r"^num_workers: a data worker died .*step-000000\d, --resume goes on", error)


class Damaged(TensorDataset):
    """Rows of which one cannot be read."""

    def __getitem__(self, row):
        if row == 37:
            raise InputError("row 37, column 'image': cannot be read")
        return super().__getitem__(row)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (Damaged, "^row 37, column 'image': cannot be read$"),
        (Dying, "^num_workers: .*step-0000003"),
    ],
)
def test_what_a_data_worker_meets_while_a_search_resumes_is_one_line(tmp_path, rows, text):
    tensors = split(40, 0, 0).tensors
    train = DataLoader(TensorDataset(*tensors), 8)
    with pytest.raises(Stopped):
        make(tmp_path, loss=at_call(3, ask_to_stop), train=train).run()
    train = DataLoader(rows(*tensors), 8, num_workers=1)
    with pytest.raises(InputError, match=text):
        make(tmp_path, train=train).resume()


def test_a_full_disk_stops_and_keeps_the_checkpoints_before(tmp_path):
    search = make(tmp_path, save_steps=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    counted = at_call(6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard)))
    search.weights.loss_fn = counted
    search.bilevel.val_loss_fn = partial(counted, search.supernet.model)
    try:
        with pytest.raises(InputError, match=r"step-0000006: cannot be written"):
            search.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = [os.path.basename(path) for path in checkpoints(str(tmp_path))]
    assert kept == ["step-0000002", "step-0000004"]
    assert make(tmp_path, save_steps=2).run(resume=True) == make().run()


@pytest.mark.parametrize("fault", ["missing", "at the start", "in the middle"])
def test_without_tensorboard_the_search_goes_on(monkeypatch, tmp_path, fault):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    if fault == "missing":
        monkeypatch.setitem(sys.modules, "darts_lora.views.tensorboard", None)
    else:
        method = "__init__" if fault == "at the start" else "add_images"
        monkeypatch.setattr(torch.utils.tensorboard.SummaryWriter, method, fail)
    search = make(tmp_path)
    with pytest.warns(UserWarning, match=r"TensorBoard is left out from step \d .*has all") as told:
        genotype = search.run()
    assert len(told) == 1 and genotype == Genotype.load(tmp_path / "genotype.json")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == [4, 8, 12]


def test_accumulated_batches_train_as_one_large_batch():
    models = []
    for parts, batch_size in ((1, 16), (2, 8)):
        search = make(
            train=loader(batch_size=batch_size, shuffle=False),
            gradient_accumulation_steps=parts,
            max_steps=2,
        )
        search.run()
        models.append([w.detach() for w in search.supernet.weight_parameters()])
    for one, other in zip(*models, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_bf16_computes_in_bf16_and_keeps_alpha_and_weights_in_float32():
    AcceleratorState._reset_state(reset_partial_state=True)
    seen = set()

    def recording(model, batch):
        layer = search.supernet.layers["blocks.0"].base_layer
        layer.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
        return loss_fn(model, batch)

    search = make(loss=recording, mixed_precision="bf16")
    search.run()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert seen == {torch.bfloat16}
    parameters = [*search.supernet.weight_parameters(), search.supernet.alpha]
    assert {p.dtype for p in parameters} == {torch.float32}


@pytest.mark.parametrize("given, dtype, used", [
    ("no", torch.float16, "fp16"), ("bf16", torch.float16, "bf16"),
    ("no", torch.bfloat16, "no"), ("no", torch.float32, "no"),
])  # fmt: skip
def test_a_model_in_float16_is_searched_with_loss_scaling(given, dtype, used, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    model = type("Half", (torch.nn.Sequential,), {"dtype": dtype})(residual(WIDTH))
    with mock.patch("darts_lora.run.launch.Accelerator", wraps=Accelerator) as made:
        RankSearch(
            Supernet(model, SearchConfig(ranks=(0, 2), budget_rank=1)), loader(), loader(),
            training=TrainingConfig(max_steps=4, mixed_precision=given), loss_fn=loss_fn,
        )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    assert made.call_args.kwargs["mixed_precision"] == used


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    calls = itertools.count(1)

    def exploding(model, batch):
        return loss_fn(model, batch) * (float("nan") if next(calls) == 7 else 1.0)

    search = make(tmp_path, loss=exploding, save_steps=4)
    message = r"learning_rate=0\.01: the training loss .* at step 7;"
    with pytest.raises(DivergedError, match=message):
        search.run()
    (kept,) = checkpoints(str(tmp_path))
    assert kept.endswith("step-0000004")
    assert make(tmp_path, save_steps=4).run(resume=True).num_parameters > 0


def test_a_validation_loss_that_is_not_finite_is_told_with_its_own_step(tmp_path):
    def exploding(model, batch):
        alone = search.supernet._probe is not None and search.step == 6
        return loss_fn(model, batch) * (float("nan") if alone else 1.0)

    search = make(tmp_path, loss=exploding, logging_steps=12)
    with pytest.raises(DivergedError, match=r"the validation loss is infinite or NaN at step 7;"):
        search.run()


def test_a_genotype_knows_the_weights_that_it_was_found_with(tmp_path):
    """One that was derived stays in the folder when another search takes its place."""
    derived = discretize(make(tmp_path).run(), budget_rank=1)
    path = tmp_path / "supernet.safetensors"
    assert derived.inherited_state(path)
    make(tmp_path, seed=1).run()
    with pytest.raises(InputError, match="is of another search than the weights in"):
        derived.inherited_state(path)


def test_nothing_of_a_finished_search_is_left_when_another_one_begins(tmp_path):
    make(tmp_path).run()
    remove_search(str(tmp_path))
    assert not {"genotype.json", "supernet.safetensors"} & {*os.listdir(tmp_path)}
    assert not checkpoints(str(tmp_path))


def test_the_genotype_keeps_its_budget(tmp_path):
    search = make(tmp_path, max_steps=30)
    genotype = search.run()
    assert genotype.num_parameters <= search.supernet.budget == 2 * 4 * 2 * WIDTH
    found_by = genotype.found_by
    assert (found_by["steps"], found_by["run_steps"], found_by["seed"]) == (30, 30, 0)
    assert found_by["verdict"]["chosen_parameters"] == genotype.num_parameters
    # the weights beside it are the searched ones
    inherited = genotype.inherited_state(tmp_path / "supernet.safetensors")
    assert all(
        torch.equal(inherited[key], value)
        for key, value in genotype.inherited_state(search.supernet).items()
    )


def test_a_plain_model_without_a_loss_fn_is_told_so():
    with pytest.raises(InputError, match="loss_fn: a batch is a list, no dict of a transformers"):
        make(loss=model_loss).run()
    for output in ({"logits": 1}, torch.zeros(2)):
        with pytest.raises(InputError, match=f"a model gives no loss .{type(output).__name__}.;"):
            model_loss(lambda x, output=output: output, {"x": 1})
    assert model_loss(lambda x: {"loss": x}, {"x": 1}) == 1


def test_options_that_cannot_work_are_refused_before_any_step(tmp_path):
    with pytest.raises(InputError, match=r"train data loader: gives no batch"):
        make(train=loader(rows=4))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir=.*file'?.*: cannot be written"):
        make(tmp_path / "file" / "below").run()
    with pytest.raises(InputError, match="resume: there is no checkpoint"):
        make(tmp_path / "new").run(resume=True)
    make(tmp_path / "done").run()
    with pytest.raises(InputError, match="max_steps=8: the search to resume has max_steps=12;"):
        make(tmp_path / "done", max_steps=8).run(resume=True)
