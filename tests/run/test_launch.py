"""Ways to launch that are refused; accelerate's environment variables: none changes what a search
computes, bad ones are one line; the order of rows under a caller's own accelerator.
Not here: searches under the ways that work (test_processes.py)."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, DistributedType
from test_search import make
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from darts_lora import InputError
from darts_lora.finetune import FinetuneConfig, finetune
from darts_lora.run.launch import (
    check_accumulation,
    check_distribution,
    check_launch,
    check_replays,
    explained,
    prepare_loaders,
)

REFUSED = {
    "FSDP, version 1": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version=1"),
    "FSDP, unsaid": ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version=1"),
    "DeepSpeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, "distributed_type=DEEPSPEED"),
    "Megatron-LM": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "distributed_type=MEGATRON_LM"),
}


@pytest.mark.parametrize(("variables", "what"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_before_anything_is_loaded(variables, what, monkeypatch, tmp_path):
    check_launch()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=rf"^{what}: .* fsdp2\.yaml or single\.yaml"):
        check_launch()
    with pytest.raises(InputError, match=r"^distributed_type=.* or single\.yaml"):
        finetune(FinetuneConfig(output_dir=str(tmp_path)), *[None] * 3)


def test_the_second_version_of_fsdp_is_not(monkeypatch):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    check_launch()


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "FSDP"])
def test_an_accelerator_of_such_a_kind_is_refused(kind):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    check_distribution(accelerator)
    accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)
    accelerator.state.distributed_type = DistributedType(kind)
    try:
        with pytest.raises(InputError, match=f"=({kind}|1): hides which weights"):
            check_distribution(accelerator)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


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


def order(loader, epoch):
    loader.set_epoch(epoch)
    return torch.cat(list(loader)).tolist()


@pytest.mark.parametrize("own", [{}, {"use_seedable_sampler": False}, {"data_seed": 5}])
def test_a_callers_accelerator_replays_rows(own):
    """Whatever was drawn meanwhile, as in a process that resumes."""
    config = DataLoaderConfiguration(**own)
    orders = []
    for _ in range(2):
        accelerator = Accelerator(cpu=True, dataloader_config=config)
        given = [DataLoader(range(50), 5, shuffle=True)]
        (loader,) = prepare_loaders(accelerator, given, seed=3, resumable=True)
        check_replays([loader])
        torch.rand(7)
        orders.append([order(loader, epoch) for epoch in (0, 1)])
        assert accelerator.dataloader_config == config
    assert orders[0] == orders[1] and orders[0][0] != orders[0][1]


class Batches(torch.utils.data.BatchSampler):
    """What draws batches by itself, and has no sampler inside."""

    def __init__(self):
        self.batch_size, self.drop_last = 2, False

    def __iter__(self):
        yield from torch.randperm(10).view(5, 2).tolist()

    def __len__(self):
        return 5


@pytest.mark.parametrize("made", [
    lambda: DataLoader(range(10), 2, sampler=WeightedRandomSampler([1.0] * 10, 10)),
    lambda: DataLoader(range(10), batch_sampler=Batches()),
], ids=["WeightedRandomSampler", "Batches"])  # fmt: skip
def test_orders_that_do_not_come_back_are_refused_on_resume(made, request):
    name = request.node.callspec.id
    accelerator = Accelerator(cpu=True)
    (loader,) = prepare_loaders(accelerator, [made()], seed=0, resumable=False)
    with pytest.warns(UserWarning, match=f"this search cannot be resumed; resume: the {name} of"):
        prepare_loaders(accelerator, [made()], seed=0, resumable=True)
    with pytest.raises(InputError, match=f"resume: the {name} of a data loader does not give"):
        check_replays([loader])
    plain = DataLoader(range(10), 2, sampler=RandomSampler(range(10)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = [plain, DataLoader(range(4))]
        check_replays(prepare_loaders(accelerator, given, seed=0, resumable=True))
