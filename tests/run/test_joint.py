"""One pass for both steps gives what two passes give at the same weights, and mixes no rows.
Not here: how fast it is (recipes/benchmark/speed.py)."""

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from families import TEXT
from moe_models import make_moe
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from darts_lora import Architect, InputError, RankSearch, SearchConfig, Supernet
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.data.loaders import load_splits, make_collator
from darts_lora.lora.models import load_model
from darts_lora.run.joint import JointStep, halves_loss, join
from darts_lora.run.tokens import model_loss
from darts_lora.run.weight_step import WeightStep
from small_models import randomise, residual

ROWS = 4


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).pow(2).mean()


def halves(model, batch):
    errors = (model(batch[0]) - batch[1]).pow(2)
    return tuple(half.mean() for half in errors.chunk(2))


def make(joint, **options):
    config = SearchConfig(ranks=(0, 1, 2, 4), joint=joint, **options)
    supernet = Supernet(residual(), config)
    supernet.model.double()
    supernet._place_alpha(torch.device("cpu"), torch.float64)
    randomise(supernet)
    training = TrainingConfig(learning_rate=0.1, lr_scheduler="constant", max_grad_norm=0.0)
    weights = WeightStep(supernet, Accelerator(cpu=True), training, loss_fn)
    return supernet, weights, Architect(supernet)


def batches():
    return [tuple(torch.randn(ROWS, 16, dtype=torch.float64) for _ in range(2)) for _ in range(2)]


def fix_samples(monkeypatch, supernet, branches):
    """Row by row the same draws in one pass as in two: training rows first."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(2 * ROWS, len(supernet.layers), 4, generator=generator).double()
    used = []

    def sample(alpha, relaxation, temperature, rows, _):
        if rows == 2 * ROWS:
            taken = noise
        else:
            assert rows == ROWS
            taken = noise[:ROWS] if not used else noise[ROWS:]
            used.append(rows)
        soft = (alpha + taken).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return hard + (soft - soft.detach())

    monkeypatch.setattr("darts_lora.supernet.sample", sample)


@pytest.mark.parametrize("branches", ["independent", "nested"])
@pytest.mark.parametrize("opaque", [False, True])
def test_gradients_are_those_of_two_passes(branches, opaque, monkeypatch):
    supernet, weights, architect = make(True, branches=branches)
    if opaque:  # a hook: the layers call their base layer
        for layer in supernet.layers.values():
            layer.base_layer.register_forward_hook(lambda module, args, y: y)
    fix_samples(monkeypatch, supernet, branches)
    train, val = batches()
    loss, apart = weights.gradients(train)
    val_loss, (gradient,) = architect.first_order(lambda b: loss_fn(supernet.model, b), val)
    step = JointStep(weights, architect, halves)
    losses, (joint_gradient, *joint_apart) = step.gradients(join(train, val))
    assert torch.allclose(losses, torch.stack([loss, val_loss]), atol=1e-12)
    assert (joint_gradient - gradient).abs().max() < 1e-12 * gradient.abs().max() + 1e-14
    for own, other in zip(joint_apart, apart, strict=True):
        assert (own - other).abs().max() < 1e-12
    assert gradient.abs().max() > 1e-4 and max(g.abs().max() for g in apart) > 1e-4


@pytest.mark.parametrize(
    "options", [{}, {"sampling": "batch"}, {"relaxation": "softmax"}, {"relaxation": "gumbel"}]
)
def test_no_row_of_one_half_moves_what_the_other_trains(options):
    found = []
    for changed in (None, "train", "val"):
        _, weights, architect = make(True, **options)
        torch.manual_seed(1)
        train, val = batches()
        if changed:
            {"train": train, "val": val}[changed][1].add_(1.0)
        torch.manual_seed(2)  # the same samples
        _, (gradient, *others) = JointStep(weights, architect, halves).gradients(join(train, val))
        found.append((gradient, torch.cat([g.flatten() for g in others])))
    (alpha, lora), (alpha_train, lora_train), (alpha_val, lora_val) = found
    assert torch.equal(alpha, alpha_train) and not torch.equal(alpha, alpha_val)
    assert torch.equal(lora, lora_val) and not torch.equal(lora, lora_train)


def test_a_step_updates_as_the_two_steps_do(monkeypatch):
    """At a weights' rate of nearly 0, where the order of the steps does not matter."""
    results = []
    for joint in (False, True):
        torch.manual_seed(1)
        supernet, weights, architect = make(joint)
        fix_samples(monkeypatch, supernet, "independent")
        weights.optimizer.param_groups[0]["lr"] = 1e-12
        train, val = batches()
        if joint:
            loss, metrics = JointStep(weights, architect, halves).step(iter([train]), iter([val]))
        else:
            loss, _ = weights.step(iter([train]))
            metrics = architect.step(partial(loss_fn, supernet.model), val)
        results.append([loss, metrics["loss"], metrics["gradient_norm"], supernet.alpha.detach()])
        assert supernet.alpha.grad is None
        assert all(p.grad is None for p in supernet.weight_parameters())
    for own, other in zip(*results, strict=True):
        assert torch.allclose(own, other, atol=1e-9)


def text_batches():
    """Of unlike lengths and shares of supervised tokens."""
    for length, learnt in ((12, 9), (7, 2)):
        tokens = torch.randint(0, 60, (ROWS, length))
        labels = tokens.masked_fill(torch.arange(length) < length - learnt, -100)
        yield {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


@pytest.mark.parametrize("kind", ["text", "images"])
def test_halves_of_a_batch_have_the_losses_of_two_batches(kind, vision_folder, data_folder):
    if kind == "text":
        config = LlamaConfig(**TEXT | {"vocab_size": 61})
        model, (train, val) = LlamaForCausalLM(config), text_batches()
    else:
        config, data = ModelConfig(vision_folder), DataConfig(data_folder, max_length=32)
        collator, split = make_collator(config, data), load_splits(data)["train"]
        model = load_model(config)
        train, val = (collator([split[i] for i in rows]) for rows in ((0, 1, 2), (3, 4, 5)))
    together = halves_loss(model, join(train, val))
    apart = [model_loss(model, batch) for batch in (train, val)]
    assert torch.allclose(torch.stack(together), torch.stack(apart), atol=1e-5)


def test_batches_are_joined_row_by_row():
    first = {"input_ids": torch.ones(2, 3), "labels": torch.ones(2, 3), "images": torch.ones(3, 4)}
    second = {"input_ids": torch.ones(2, 2), "labels": torch.ones(2, 2), "images": torch.ones(3, 1)}
    batch = join(first, second)
    assert batch["input_ids"].tolist() == [[1, 1, 1]] * 2 + [[1, 1, 0]] * 2
    assert batch["labels"].tolist() == [[1, 1, 1]] * 2 + [[1, 1, -100]] * 2
    assert batch["images"].tolist() == [[1, 1, 1, 1]] * 3 + [[1, 0, 0, 0]] * 3
    with pytest.raises(InputError, match="differ in their structure; use joint=false"):
        join(first, {"input_ids": torch.ones(2, 2)})
    with pytest.raises(InputError, match="differ in images"):
        join(first, {**second, "images": None})


@pytest.mark.parametrize(
    "images", [torch.ones(1, 3, 8, 8), torch.ones(8, 12)], ids=["one image less", "packed patches"]
)
def test_images_whose_border_is_not_in_the_middle_are_refused(images):
    """Else the rows of validation images next to it would train the weights."""
    tokens = {"input_ids": torch.ones(2, 3)}
    first = {**tokens, "pixel_values": torch.ones(2 * len(images), *images.shape[1:])}
    text = f"pixel_values has {2 * len(images)} entries .* {len(images)} in a .*or joint=false"
    with pytest.raises(InputError, match=f"^joint=true: {text}$"):
        join(first, {**tokens, "pixel_values": images})


def search(model, rows=8, **options):
    loader = DataLoader(torch.randn(rows, 2, 16), batch_size=4, drop_last=True)
    options = {"search_fraction": 1.0, "arch_every": 1, "warmup_steps": 2} | options
    config = SearchConfig(ranks=(0, 1, 2), budget_rank=1, joint=True, **options)
    training = TrainingConfig(max_steps=8, gradient_accumulation_steps=2)
    return RankSearch(
        Supernet(model, config),
        loader,
        DataLoader(torch.randn(8, 2, 16), batch_size=4),
        training=training,
        loss_fn=lambda model, batch: model(batch).pow(2).mean(),
        joint_loss_fn=lambda model, batch: [y.pow(2).mean() for y in model(batch).chunk(2)],
    )


def test_a_search_by_joint_passes(monkeypatch):
    run = search(residual())
    passes = []
    monkeypatch.setattr(
        run.architect, "step", lambda *args: pytest.fail("a pass of its own for alpha")
    )
    run.supernet.model.register_forward_pre_hook(lambda m, args: passes.append(len(args[0])))
    genotype = run.run()
    assert passes == [4, 4] * 2 + [4, 8] * 6  # two steps of warm-up; two batches accumulated
    assert set(genotype.ranks.values()) <= {0, 1, 2}
    assert not torch.equal(run.supernet.alpha, torch.zeros_like(run.supernet.alpha))


class Packed(nn.Module):
    """Its layer sees all tokens of a batch in one row, as packed sequences are."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(x.flatten(0, 1)[None]).view(x.shape)


class TokensFirst(nn.Module):
    """Its second layer's leading size is that of the tokens: even, but not the rows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.second(self.first(x).transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("warmup_steps", [0, 2])
@pytest.mark.parametrize("options", [{"sampling": "batch"}, {"relaxation": "softmax"}])
def test_a_leading_size_that_only_looks_like_rows_is_refused(options, warmup_steps):
    with pytest.raises(InputError, match="joint=true: second does not see the batch's rows one"):
        search(TokensFirst(), warmup_steps=warmup_steps, **options).run()


def test_rows_are_looked_at_until_each_layer_was_drawn():
    torch.manual_seed(1)
    supernet, weights, architect = make(True)
    step, (train, val) = JointStep(weights, architect, halves), batches()
    with torch.no_grad():
        supernet.alpha[0] = torch.tensor([50.0, 0, 0, 0])  # rank 0: it tells nothing
    step.step(iter([train]), iter([val]))
    assert step.unseen == {"blocks.0"}
    with torch.no_grad():
        supernet.alpha[0] = torch.tensor([0.0, 0, 0, 50])
    step.step(iter([train]), iter([val]))
    assert not step.unseen


def test_searched_experts_are_refused():
    config = SearchConfig(ranks=(0, 1), joint=True, target_parameters="all-experts")
    supernet = Supernet(make_moe("mixtral"), config)
    training = TrainingConfig()
    weights = WeightStep(supernet, Accelerator(cpu=True), training, model_loss)
    with pytest.raises(InputError, match=r"joint=true: \S+\.experts\.gate_up_proj sees tokens of"):
        JointStep(weights, Architect(supernet), halves_loss)


def test_what_mixes_rows_is_refused():
    with pytest.raises(InputError, match=r"joint=true: a layer 16 -> 16 sees .*\(1, 16, 16\)"):
        search(Packed()).run()
    with pytest.raises(InputError, match=r"joint=true: blocks\.0 is trained in full"):
        search(residual(), modules_to_save=["blocks.0"])
    _, weights, architect = make(True)
    train, val = batches()
    with pytest.raises(InputError, match=r"joint=true: a tensor has 4 .* 2 in .*and drop_last, or"):
        JointStep(weights, architect, halves).step(iter([train]), iter([tuple(v[:2] for v in val)]))
    weights.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(InputError, match=r"joint=true, mixed_precision=fp16: .*use bf16 or joint"):
        JointStep(weights, architect, halves)
    with pytest.raises(InputError, match="joint=true, order=2"):
        SearchConfig(joint=True, order=2)
    with pytest.raises(InputError, match=r"joint=true, arch_average=0\.125: .* or arch_average=0$"):
        SearchConfig(joint=True, arch_average=0.125)


def test_rows_stay_apart_in_a_vision_language_model(vision_folder, data_folder):
    """Tiles, cross-attention and text of one row only: seen by what the weights learn."""
    data = DataConfig(data_folder, max_length=32, split_by="row")
    collator, split = make_collator(ModelConfig(vision_folder), data), load_splits(data)["train"]
    found = []
    for others in ((3, 4, 5), (6, 7, 8)):
        model = load_model(ModelConfig(vision_folder))
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.data.fill_(0.5)  # closed gates give the vision tower no gradient
        supernet = Supernet(model, SearchConfig(ranks=(0, 2), joint=True))
        randomise(supernet)
        weights = WeightStep(supernet, Accelerator(cpu=True), TrainingConfig(), model_loss)
        batch = join(*(collator([split[i] for i in rows]) for rows in ((0, 1, 2), others)))
        torch.manual_seed(1)
        _, (alpha, *gradients) = JointStep(weights, Architect(supernet), halves_loss).gradients(
            batch
        )
        found.append((alpha, gradients))
    (alpha, gradients), (other_alpha, other_gradients) = found
    assert (alpha - other_alpha).abs().max() > 1e-4
    for name, own, other in zip(supernet.state_dict(), gradients, other_gradients, strict=False):
        assert torch.allclose(own, other, atol=2e-5), name  # in float64 they differ by 4e-15
