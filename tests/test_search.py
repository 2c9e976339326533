"""The loop: which batch trains what, the same seed twice, resume, errors, what is written.
Not here: a single architecture step (test_architect.py), the recipe (recipes/test_search.py)."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, TensorDataset

from darts_lora import Genotype, InputError, RankSearch, SearchConfig, Supernet
from darts_lora.checkpoint import checkpoints
from darts_lora.config import TrainingConfig
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


def make(output_dir=None, loss=loss_fn, train=None, **options):
    names = TrainingConfig.__dataclass_fields__
    training = {key: options.pop(key) for key in list(options) if key in names}
    training = {"max_steps": 12, "learning_rate": 0.01, "logging_steps": 4, **training}
    config = SearchConfig(**{"ranks": (0, 1, 2, 4), "budget_rank": 2, **options})
    return RankSearch(
        Supernet(residual(WIDTH), config),
        loader() if train is None else train,
        loader(first=1000, seed=1),
        training=TrainingConfig(**training),
        output_dir=None if output_dir is None else str(output_dir),
        loss_fn=loss,
    )


def snapshot(search):
    """Weights and the state of their optimizer."""
    weights = search.supernet.weight_parameters()
    states = [search.weights.optimizer.state[w] for w in weights]
    kept = [value for state in states for value in state.values()]
    assert len(kept) == 3 * len(weights)
    return [tensor.detach().clone() for tensor in [*weights, *kept]]


@pytest.mark.parametrize("order", [1, 2])
def test_no_validation_sample_ever_enters_a_weight_step(order):
    seen = {"weights": set(), "alpha": set()}
    search = None

    def recording(model, batch):
        step = "alpha" if search.supernet._arch_gradients else "weights"
        seen[step] |= set(batch[0].tolist())
        return loss_fn(model, batch)

    search = make(loss=recording, order=order)
    architecture_steps = []
    step_of_alpha = search.architect.step

    def watched(loss, val_batch, train_batch):
        before = snapshot(search)
        metrics = step_of_alpha(loss, val_batch, train_batch)
        assert all(torch.equal(b, a) for b, a in zip(before, snapshot(search), strict=True))
        assert min(val_batch[0]) >= 1000 > max(train_batch[0])
        architecture_steps.append(val_batch)
        return metrics

    search.architect.step = watched
    search.run()
    assert len(architecture_steps) == 9, "12 steps, the first quarter warms up"
    assert max(seen["weights"]) < 1000
    if order == 1:
        assert min(seen["alpha"]) >= 1000


def test_alpha_rests_during_warm_up_and_in_every_weight_step():
    search = make(warmup_steps=5)
    alphas, weight_step = [], search.weights.step

    def watched(batches):
        before = search.supernet.stacked_alpha().detach().clone()
        result = weight_step(batches)
        assert torch.equal(search.supernet.stacked_alpha(), before)
        assert all(alpha.grad is None for alpha in search.supernet.arch_parameters())
        alphas.append(before)
        return result

    search.weights.step = watched
    search.run()
    assert all((alpha == 0).all() for alpha in alphas[:6])
    assert (alphas[6] != 0).any()


def test_warm_up_draws_every_rank_alike_whatever_the_relaxation():
    drawn = []

    def recording(model, batch):
        loss = loss_fn(model, batch)
        drawn.append(search.supernet.layers["blocks.0"].gates.ne(0).sum(-1))
        return loss

    search = make(
        loss=recording, relaxation="softmax", max_steps=301, warmup_steps=300, budget_rank=None
    )
    search.run()
    counts = torch.stack(drawn[:300]).flatten()  # independent branches: gates on = the rank
    shares = torch.stack([(counts == rank).float().mean() for rank in (0, 1, 2, 4)])
    assert (shares - 0.25).abs().max() < 0.05


def test_the_same_seed_gives_the_same_genotype_twice(tmp_path):
    genotypes = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(len(genotypes))  # what the caller drew before must not matter
        make(tmp_path / name, seed=seed).run()
        genotypes.append(Genotype.load(tmp_path / name / "genotype.json"))
    assert genotypes[0] == genotypes[1]
    assert genotypes[0].probabilities != genotypes[2].probabilities


def test_a_resumed_search_ends_as_one_in_one_go(tmp_path):
    whole = make(tmp_path / "whole", save_steps=5, dropout=0.1).run()

    class Killed(Exception):
        pass

    calls = itertools.count()

    def killing(model, batch):
        if next(calls) == 11:  # in step 8: steps 4 and on call twice
            raise Killed
        return loss_fn(model, batch)

    with pytest.raises(Killed):
        make(tmp_path / "cut", loss=killing, save_steps=5, dropout=0.1).run()
    resumed = make(tmp_path / "cut", save_steps=5, dropout=0.1).run(resume=True)
    assert resumed == whole
    of_whole, of_cut = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "cut")
    )
    assert [record["step"] for record in of_whole] == [record["step"] for record in of_cut]
    clock = {"seconds": 0, "samples_per_second": 0}
    assert {**of_whole[-1], **clock} == {**of_cut[-1], **clock}


def test_accumulated_batches_train_as_one_large_batch():
    models = []
    for parts, batch_size in ((1, 16), (2, 8)):
        search = make(
            train=loader(batch_size=batch_size, shuffle=False),
            gradient_accumulation_steps=parts,
            relaxation="softmax",
            max_steps=2,
            warmup_steps=0,
            arch_every=5,
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
    parameters = search.supernet.weight_parameters() + search.supernet.arch_parameters()
    assert {p.dtype for p in parameters} == {torch.float32}


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    calls = itertools.count(1)

    def exploding(model, batch):
        return loss_fn(model, batch) * (float("nan") if next(calls) == 7 else 1.0)

    search = make(tmp_path, loss=exploding, save_steps=4, warmup_steps=11)
    with pytest.raises(InputError, match=r"learning_rate=0\.01: the training loss .* at step 7;"):
        search.run()
    (kept,) = checkpoints(str(tmp_path))
    assert kept.endswith("step-0000004.pt")
    assert make(tmp_path, save_steps=4, warmup_steps=11).run(resume=True).num_parameters > 0


@pytest.mark.parametrize("relaxation", ["gumbel_hard", "gumbel", "softmax"])
@pytest.mark.parametrize("branches", ["independent", "nested"])
def test_the_genotype_keeps_its_budget(relaxation, branches, tmp_path):
    search = make(tmp_path, relaxation=relaxation, branches=branches, max_steps=30)
    genotype = search.run()
    assert genotype.num_parameters <= search.supernet.budget == 2 * 4 * 2 * WIDTH
    found_by = genotype.found_by
    assert (found_by["relaxation"], found_by["steps"], found_by["seed"]) == (relaxation, 30, 0)
    assert found_by["verdict"]["chosen_parameters"] == genotype.num_parameters
    # the weights beside it are the searched ones
    inherited = genotype.inherited_state(tmp_path / "supernet.safetensors")
    assert all(
        torch.equal(inherited[key], value)
        for key, value in genotype.inherited_state(search.supernet).items()
    )


def test_options_that_cannot_work_are_refused_before_any_step(tmp_path):
    with pytest.raises(InputError, match=r"warmup_steps=12: must be below max_steps=12"):
        make(warmup_steps=12)
    with pytest.raises(InputError, match=r"train data loader: gives no batch"):
        make(train=loader(rows=4))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir=.*file'?.*: cannot be written"):
        make(tmp_path / "file" / "below")
    with pytest.raises(InputError, match="resume: there is no checkpoint"):
        make(tmp_path / "new").run(resume=True)
    make(tmp_path / "done").run()
    with pytest.raises(InputError, match="max_steps=8: the checkpoint is at step 12"):
        make(tmp_path / "done", max_steps=8).run(resume=True)


TWO_PROCESSES = """
import gc
import json
from accelerate.utils import gather_object
from test_search import loss_fn, make

rows, gates = [], []
def recording(model, batch):
    loss = loss_fn(model, batch)
    if not search.supernet._arch_gradients:
        rows.append(batch[0].tolist())
    gates.append(search.supernet.layers["blocks.0"].gates.ne(0).sum().item())
    return loss

search = make(loss=recording, max_steps=5, warmup_steps=3)  # 40 rows: 5 batches of 8 an epoch
search.accelerator.wait_for_everyone()
search.run()
alpha = [search.supernet.stacked_alpha().tolist()]
weights = [[w.detach().sum().item() for w in search.supernet.weight_parameters()]]
found = [gather_object(x) for x in ([rows], [gates], alpha, weights)]
if search.accelerator.is_main_process:
    print("FOUND" + json.dumps(found))
accelerator = search.accelerator
del search, make, recording
gc.collect()  # what still holds the process group at the exit may abort it
accelerator.end_training()
"""


def test_two_processes_share_rows_and_alpha_but_not_samples(tmp_path):
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--multi_gpu", "--num_processes=2", str(tmp_path / "script.py")),
        ],
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.path.dirname(__file__),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows, gates, alpha, weights = json.loads(done.stdout.split("FOUND")[1])
    assert len(rows) == 2
    epoch = [row for process in rows for batch in process[:2] for row in batch]
    assert len(epoch) == len(set(epoch)) == 32, "no row twice before all were seen"
    assert gates[0] != gates[1]
    assert alpha[0] == alpha[1] and weights[0] == weights[1]
    assert any(value != 0 for layer in alpha[0] for value in layer)
