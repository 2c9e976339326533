"""CUDA graphs: what happens where none can be; with a GPU, that a replay is the function. Models of
images whose steps read no device value. Not here: a search with them on a CPU (test_search.py)."""

import warnings

import pytest
import torch
from families import llava, make_family
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from darts_lora import RankSearch, SearchConfig, Supernet
from darts_lora.config import ModelConfig, TrainingConfig
from darts_lora.data.collator import Collator
from darts_lora.lora.models import load_model, load_processor
from darts_lora.run.graphs import Graphed, Static, masked_scatter
from small_models import residual

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def rows(count=64, width=16):
    return torch.utils.data.DataLoader(torch.randn(count, width), batch_size=16)


def loss_fn(model, batch):
    return (model(batch) - 1).pow(2).mean()


def make(supernet, cuda_graphs, **training):
    options = {"training": TrainingConfig(**training), "loss_fn": loss_fn}
    return RankSearch(supernet, rows(), rows(), cuda_graphs=cuda_graphs, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_one_line_says_so_and_the_result_is_the_same(capsys):
    found = []
    for cuda_graphs in (False, True):
        torch.manual_seed(0)
        supernet = Supernet(residual(), SearchConfig(ranks=(0, 1, 2), budget_rank=1))
        search = make(supernet, cuda_graphs, max_steps=6, logging_steps=3)
        found.append(search.run())
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["no CUDA graph, steps are launched one by one: the device is cpu"]
    assert found[0] == found[1]


def without_gpu(monkeypatch, stream):
    """Let Graphed come as far as `stream`, which captures ask for."""
    monkeypatch.setattr(Graphed, "_aside", lambda self, batch: self.function(batch))
    monkeypatch.setattr("darts_lora.run.graphs._side_stream", stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("darts_lora.run.graphs._draw_outside_again", lambda: None)


def test_what_cannot_be_captured_runs_all_the_same_after_one_warning(monkeypatch):
    def refuse(device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    without_gpu(monkeypatch, refuse)
    graphed = Graphed(lambda batch: (batch["x"].sum(), [batch["x"] * 2]))
    assert graphed({"x": torch.ones(3)})[0] == 3
    with pytest.warns(UserWarning, match=r"no CUDA graph.*: operation not permitted .* capturing$"):
        loss, (double,) = graphed({"x": torch.ones(3)})
    assert loss == 3 and double.tolist() == [2, 2, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [graphed({"x": torch.ones(2)})[0] for _ in range(2)] == [2, 2]


def test_a_shape_is_captured_when_it_comes_again_and_each_call_changes_things_once(monkeypatch):
    asked, changed = [], []

    def refuse(device):
        asked.append(len(changed))
        raise RuntimeError("no")

    without_gpu(monkeypatch, refuse)
    graphed = Graphed(lambda batch: (changed.append(len(batch)), []))
    for count in (1, 2, 3):
        graphed(torch.ones(count))
    assert changed == [1, 2, 3] and not asked
    with pytest.warns(UserWarning, match="no CUDA graph"):
        graphed(torch.ones(2))
    assert changed == [1, 2, 3, 2] and asked == [3]


@needs_gpu
def test_random_numbers_are_drawn_after_a_failed_capture():
    def waits(batch):
        return batch["x"].sum(), [torch.randn_like(batch["x"]) * batch["x"].sum().item()]

    torch.manual_seed(0)
    graphed, batch = Graphed(waits), {"x": torch.ones(8, device="cuda")}
    graphed(batch)
    with pytest.warns(UserWarning, match="no CUDA graph"):
        first = graphed(batch)[1][0]
    second = torch.randn(8, device="cuda")
    assert not torch.equal(first / 8, second) and second.std() > 0


@needs_gpu
def test_a_replay_is_the_function_for_each_shape():
    weight = torch.randn(8, 8, device="cuda", requires_grad=True)

    def function(batch):
        loss = (batch["x"] @ weight).pow(2).mean()
        return loss.detach(), list(torch.autograd.grad(loss, [weight]))

    graphed = Graphed(function, limit=1)
    for _ in range(3):
        for count in (4, 6, 4, 9):
            batch = {"x": torch.randn(count, 8, device="cuda")}
            loss, (gradient,) = graphed(batch)
            expected, (wanted,) = function(batch)
            assert torch.allclose(loss, expected) and torch.allclose(gradient, wanted)
    assert len(graphed.captured) == 1


@needs_gpu
def test_each_call_changes_things_once():
    count = torch.zeros((), device="cuda")
    graphed = Graphed(lambda batch: (count.add_(batch.sum()).clone(), []))
    assert [int(graphed(torch.ones(2, device="cuda"))[0]) for _ in range(4)] == [2, 4, 6, 8]


@needs_gpu
def test_random_numbers_are_fresh_in_each_replay():
    graphed = Graphed(lambda batch: (batch.sum(), [torch.rand_like(batch)]))
    drawn = [graphed(torch.zeros(5, device="cuda"))[1][0].clone() for _ in range(4)]
    assert len({tuple(values.tolist()) for values in drawn}) == 4


@needs_gpu
def test_a_graphed_search_trains_as_one_without():
    """The weights draw nothing, so the two must agree within rounding."""
    found = []
    for cuda_graphs in (False, True):
        torch.manual_seed(0)
        config = SearchConfig(ranks=(0, 1, 2), budget_rank=1, search_fraction=1.0)
        supernet = Supernet(residual(), config)
        search = make(supernet, cuda_graphs, max_steps=20, gradient_accumulation_steps=2)
        search.run()
        assert not cuda_graphs or len(search.weights.graphed.captured) == 1
        found.append(supernet.state_dict())
    weights = {name: value for name, value in found[0].items() if "lora_" in name}
    for name, value in weights.items():
        assert torch.allclose(value, found[1][name], atol=1e-5), name


@pytest.mark.parametrize("spare", [0, 3])
def test_masked_scatter_is_torchs_with_its_gradients(spare):
    torch.manual_seed(0)
    mask = torch.rand(4, 5, 1) < 0.4
    tensor = torch.randn(4, 5, 2, dtype=torch.float64, requires_grad=True)
    source = torch.randn(2 * int(mask.sum()) + spare, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(tensor)
    found = []
    for function in (torch.Tensor.masked_scatter, masked_scatter):
        result = function(tensor, mask, source)
        found.append([result, *torch.autograd.grad((result * weights).sum(), [tensor, source])])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    none = masked_scatter(tensor, torch.zeros_like(mask), source)
    assert torch.equal(none, tensor)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small LLaVA in a supernet, and a batch of two questions about images."""
    folder = make_family(llava, str(tmp_path_factory.mktemp("llava")))
    config = ModelConfig(folder)
    collator = Collator(load_processor(config))
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "red"}]
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    batch = collator([{"image": image, "messages": turns} for image in images])
    torch.manual_seed(0)
    supernet = Supernet(load_model(config), SearchConfig(ranks=(0, 1, 2), budget_rank=1))
    return supernet, batch


def step(supernet, batch):
    """Loss, and gradients of weights and alphas: the vision tower's go through the merged text."""
    torch.manual_seed(1)
    loss = supernet.model(**batch).loss
    wanted = [*supernet.weight_parameters(), supernet.alpha]
    return [loss, *torch.autograd.grad(loss, wanted, materialize_grads=True)]


def test_a_step_of_llava_is_the_same(made):
    supernet = made[0]
    for name, weight in supernet.model.named_parameters():
        if weight.requires_grad and "vision" in name:
            torch.nn.init.normal_(weight)  # B too, or A had no gradient
    expected = step(*made)
    with Static():
        found = step(*made)
    assert any(gradient.any() for gradient in found[1:])
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_of_llava_reads_no_value_from_the_device(made):
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        batch = {name: fake.from_tensor(value) for name, value in made[1].items()}
        with pytest.raises(DataDependentOutputException):
            step(made[0], batch)
        with Static():
            step(made[0], batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_of_llava_is_captured(made):
    supernet = made[0]
    supernet.model.to("cuda")

    def function(batch):
        loss, *gradients = step(supernet, batch)
        return loss.detach(), gradients

    try:
        batch = {name: value.to("cuda") for name, value in made[1].items()}
        graphed = Graphed(function)
        loss, gradients = graphed(batch)
        expected, wanted = function(batch)
    finally:
        supernet.model.to("cpu")
    assert not graphed.failed
    torch.testing.assert_close(loss, expected)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other)
