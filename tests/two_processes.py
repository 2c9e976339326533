"""What test_processes.py launches in two processes: searches under DDP and under FSDP2.
Not here: what must come out of them. Each process writes what it saw to <folder>/<process>.json."""

import contextlib
import gc
import itertools
import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from run.test_steps import Tagger
from run.test_steps import rows as tagged_rows
from run.test_steps import search as tagger_search
from test_search import WIDTH, loss_fn, make, split
from test_trainer import make_trainer, problem
from test_trainer import model_loss as trainer_loss
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import default_collate

from darts_lora import Architect, InputError, SearchConfig, Supernet
from darts_lora.base.interruption import Stopped
from darts_lora.run import launch
from darts_lora.run.resume import full
from darts_lora.run.tokens import model_loss
from darts_lora.trainer import RankSearchCallback
from small_models import Residual, randomise, residual


def accelerator(sharded: bool, **options) -> Accelerator:
    """accelerate keeps FSDP for GPUs; PyTorch shards on CPUs as well, and it is told so here."""
    AcceleratorState._reset_state()
    if PartialState._shared_state:
        PartialState().distributed_type = DistributedType.MULTI_CPU
    made = Accelerator(**options)
    if sharded:
        made.state.distributed_type = DistributedType.FSDP
        PartialState().distributed_type = DistributedType.FSDP
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["MixedRankLinear"],
            cpu_ram_efficient_loading=False,
        )
    return made


@contextlib.contextmanager
def under(sharded: bool):
    """RankSearch makes its accelerator for DDP, or for FSDP2."""
    launch.Accelerator = partial(accelerator, sharded)
    yield
    gc.collect()


def result(search) -> dict:
    weights = [full(weight.detach()) for weight in search.supernet.weight_parameters()]
    return {
        "processes": search.accelerator.num_processes,
        "model": type(search.model).__name__,
        "alpha": search.supernet.alpha.tolist(),
        "weights": torch.cat([weight.flatten() for weight in weights]).tolist(),
    }


def rows_and_samples() -> dict:
    rows, gates = [], []

    def recording(model, batch):
        loss = loss_fn(model, batch)
        if search.supernet._probe is None:
            rows.append(batch[0].tolist())
        gates.append(search.supernet.layers["blocks.0"].gates.sum().item())
        return loss

    search = make(loss=recording, max_steps=5)  # 40 rows: 5 batches of 8 an epoch
    search.run()
    return {"rows": rows, "gates": gates, **result(search)}


def places_drawn_in_a_trainer(folder: Path) -> dict:
    model, train, validation = problem()
    config = SearchConfig(ranks=(0, 1, 2), budget_rank=1, search_fraction=1.0)
    supernet, gates, rows = Supernet(model, config), [], []

    def recording(model, batch):
        rows.append(batch["labels"][:, 0].tolist())
        return trainer_loss(model, batch)

    trainer = make_trainer(model, train, validation, folder / "trainer", steps=2)
    RankSearchCallback(trainer, supernet, recording)
    model.register_forward_hook(lambda *_: gates.append(supernet.layers["layers.0"].gates.tolist()))
    trainer.train()
    return {"gates": gates, "rows": rows, "alpha": supernet.alpha.tolist()}


def gradients_of_the_joined_batch(process: int) -> dict:
    """Of the weights and of gates, by two processes on 8 rows each, and by one on all 16."""
    tensors = split(16, 0, seed=5).tensors
    search = make(max_steps=1)
    alone = Supernet(residual(WIDTH), search.supernet.config)
    architect = Architect(alone, 1)
    for supernet in (search.supernet, alone):
        randomise(supernet)
    halves = [[tensor[8 * half :][:8] for tensor in tensors] for half in (0, 1)]
    own = halves[process]
    search.accelerator.backward(loss_fn(search.model, own))
    loss_fn(alone.model, tensors).backward()
    pairs = [
        (ours.grad, whole.grad)
        for ours, whole in zip(
            search.supernet.weight_parameters(), alone.weight_parameters(), strict=True
        )
    ]
    alone_loss = partial(loss_fn, alone.model)
    with mock.patch("torch.rand", lambda *_, **__: torch.tensor(0.3)):  # the same places on both
        search.architect.step(partial(loss_fn, search.supernet.model), itertools.repeat(own))
        gains = [architect.path(alone_loss, half)[1][0] for half in halves]
    architect.step(alone_loss, itertools.repeat(tensors))
    pairs.append((search.architect.measured.gains[0], sum(gains) / 2))
    pairs += [
        (getattr(search.architect.measured, part), getattr(architect.measured, part))
        for part in ("energies", "losses", "cut")
    ]
    return {
        "differences": [float((ours - whole).abs().max()) for ours, whole in pairs],
        "sizes": [float(whole.abs().max()) for _, whole in pairs],
    }


def gradients_by_tokens(process: int) -> dict:
    """Of the weights and of gates, by two processes whose rows have unlike numbers of learnt
    tokens."""
    data = tagged_rows((1, 7, 2, 8))
    first, whole = default_collate(data[:2]), default_collate(data)
    own = default_collate([data[process]]), default_collate([data[2 + process]])
    made = tagger_search(data, 1, 2)
    alone = Supernet(Tagger(WIDTH), made.supernet.config)
    alone.model.load_state_dict(made.supernet.model.state_dict())
    reference = Architect(alone, 1)
    for supernet in (made.supernet, alone):
        randomise(supernet)
    made.weights.step(iter(own))
    model_loss(alone.model, whole).backward()
    pairs = zip(made.supernet.weight_parameters(), alone.weight_parameters(), strict=True)
    pairs = [(ours.grad, whole.grad) for ours, whole in pairs]
    made.architect.taken = made.architect.steps - 1
    made.architect.step(made.bilevel.val_loss_fn, itertools.repeat(own[0]))
    reference.step(partial(model_loss, alone.model), itertools.repeat(first))
    pairs += [
        (getattr(made.architect.measured, part), getattr(reference.measured, part))
        for part in ("energies", "losses", "cut")
    ]
    return {
        "differences": [float((ours - whole).abs().max()) for ours, whole in pairs],
        "sizes": [float(whole.abs().max()) for _, whole in pairs],
    }


class Chosen(Residual):
    """Each batch says which of the blocks it goes through; the last one's output is shown alone."""

    def forward(self, x, blocks):
        for i in blocks:
            x = x + torch.tanh(self.blocks[i](x))
        return {"y": x, "shown": self.blocks[3](x)}


def gradients_of_layers_that_rest(process: int) -> list[dict]:
    """Of two steps of two batches each, by two processes, and by one on all four: some layers are
    used by one process alone, some in no batch that is reduced, some never."""

    def loss(model, batch):
        return (model(batch[1], batch[3])["y"] - batch[2]).pow(2).mean()

    tensors, found = split(32, 0, seed=5).tensors, []
    options = {"gradient_accumulation_steps": 2, "model": Chosen(WIDTH)}
    search = make(loss=loss, **options)
    alone = Supernet(Chosen(WIDTH), search.supernet.config)
    alone.model.load_state_dict(search.supernet.model.state_dict())
    for supernet in (search.supernet, alone):
        randomise(supernet)
    search.weights.update = lambda: None  # the gradients stay
    for blocks in ([[0, 1], [0], [0, 2], [0]], [[1], [1, 2], [1], [1]]):  # each process has two
        batches = [[t[8 * i :][:8] for t in tensors] + [own] for i, own in enumerate(blocks)]
        search.weights.step(iter(batches[2 * process :][:2]))
        for batch in batches:
            (loss(alone.model, batch) / 4).backward()
        pairs = zip(search.supernet.weight_parameters(), alone.weight_parameters(), strict=True)
        gradients = [(ours.grad, whole.grad) for ours, whole in pairs]
        used = [pair for pair in gradients if None not in pair]
        found.append(
            {
                "none": [[g is None for g in pair] for pair in gradients],
                "differences": [float((ours - whole).abs().max()) for ours, whole in used],
                "sizes": [float(whole.abs().max()) for _, whole in used],
            }
        )
        for supernet in (search.supernet, alone):
            supernet.model.zero_grad(set_to_none=True)
    return found


OPTIONS = {"max_steps": 6, "save_steps": 3, "gradient_accumulation_steps": 2}


def whole_and_resumed(folder: Path) -> dict:
    """A search with checkpoints, and one that goes on from the first of them."""
    options = {**OPTIONS, "max_grad_norm": 0.05}
    search = make(folder, **options)
    sharded = sum(isinstance(w, DTensor) for w in search.supernet.weight_parameters())
    genotype = search.run()
    units = [module for module in search.model.modules() if isinstance(module, FSDPModule)]
    ahead = [len(unit._get_fsdp_state()._states_to_forward_prefetch) for unit in units]
    found = {"whole": result(search), "sharded": sharded, "gathered_ahead": ahead}
    sources = {"file": str(folder / "supernet.safetensors")}
    if not sharded:
        sources["own"] = search.supernet  # as a search and its finetune in one process do
    found |= {"ranks": genotype.ranks}
    found |= {name: products(genotype, source) for name, source in sources.items()}
    if search.accelerator.is_main_process:
        found["metrics"] = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        shutil.rmtree(folder / "checkpoints" / "step-0000006")
    search.accelerator.wait_for_everyone()
    resumed = make(folder, **options)
    resumed.run(resume=True)
    return {**found, "resumed": result(resumed)}


def products(genotype, source) -> dict:
    """B A of each layer that is handed over."""
    state = genotype.inherited_state(source)
    names = [name for name, rank in genotype.ranks.items() if rank]
    pairs = ([state[f"base_model.model.{n}.lora_{x}.weight"] for x in "BA"] for n in names)
    return {n: (b @ a).tolist() for n, (b, a) in zip(names, pairs, strict=True)}


def handover_in_a_trainer(folder: Path) -> str:
    model, train, validation = problem()
    trainer = make_trainer(model, train, validation, folder / "handover", steps=8)
    RankSearchCallback(trainer, SearchConfig(ranks=(0, 1, 2), budget_rank=1), trainer_loss)
    try:
        trainer.train()
    except InputError as error:
        return str(error)


def stop(process: int) -> dict:
    """One of the processes is asked to stop in its first step; entries are two steps apart."""

    def asked(model, batch):
        if process == 1 and search.step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_fn(model, batch)

    search = make(loss=asked, logging_steps=2)
    try:
        search.run()
    except Stopped as stopped:
        return {"status": stopped.code, "step": search.step}


def diverge(process: int, folder: Path) -> str:
    def changed(model, batch):
        if process == 1 and search.step == 3:
            search.supernet.alpha.data[0, 0] += 1e-6
        return loss_fn(model, batch)

    search = make(folder, loss=changed, save_steps=2)
    try:
        search.run()
    except InputError as error:
        return str(error)


def main(folder: Path) -> None:
    process, seen = int(os.environ["RANK"]), {}
    with under(sharded=False):
        seen["shared"] = rows_and_samples()
        seen["joined"] = gradients_of_the_joined_batch(process)
        seen["tokens"] = gradients_by_tokens(process)
        seen["trainer"] = places_drawn_in_a_trainer(folder)
        seen["handover in a trainer"] = handover_in_a_trainer(folder)
        seen["resting"] = gradients_of_layers_that_rest(process)
        seen["ddp"] = whole_and_resumed(folder / "ddp")
        seen["stop"] = stop(process)
        seen["diverge"] = diverge(process, folder / "diverge")
    with under(sharded=True):
        seen["fsdp2"] = whole_and_resumed(folder / "fsdp2")
    (folder / f"{process}.json").write_text(json.dumps(seen))
    gc.collect()  # what still holds the process group at the exit may abort it
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
