"""Static: the same numbers as without it, and models of images whose steps read no device value.
Not here: captures of other models (test_graphs.py)."""

import pytest
import torch
from families import llava, make_family
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from darts_lora import SearchConfig, Supernet
from darts_lora.config import ModelConfig
from darts_lora.data.collator import Collator
from darts_lora.lora.models import load_model, load_processor
from darts_lora.run.graphs import Graphed
from darts_lora.run.static import Static, masked_scatter


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
