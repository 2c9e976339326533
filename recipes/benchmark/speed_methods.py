"""The ways that speed.py compares: each makes its steps on a frozen model, and takes itself out.
Not here: models, batches, clocks (speed.py)."""

from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from darts_lora import Architect, SearchConfig, Supernet
from darts_lora.config import TrainingConfig
from darts_lora.run.graphs import Graphed
from darts_lora.run.tokens import model_loss
from darts_lora.run.weight_step import WeightStep


def _trainer(parameters: list, loss, graph: bool = False) -> callable:
    """A whole weight step: forward, backward, AdamW; with `graph` all of it as one CUDA graph."""
    cuda = parameters[0].device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=cuda or None, capturable=graph)

    def step(batch):
        value = loss(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach(), []

    return Graphed(step) if graph else step


def forward_only(model, ranks):
    """The frozen model's forward."""

    def step(batch):
        with torch.no_grad():
            model_loss(model, batch)

    return {"forward": step}, lambda: None


def frozen(model, ranks):
    """Forward, and backward to the inputs: gradients that no method can spare."""
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda m, args, y: y.requires_grad_(True))

    def step(batch):
        batch = dict(batch)
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].detach().requires_grad_(True)
        model_loss(model, batch).backward()

    return {"forward and backward": step}, hook.remove


def _peft(model, ranks, *, autocast_adapter_dtype, autocast=False, graph=False):
    names = "all-linear"
    config = LoraConfig(r=ranks[-1], lora_alpha=2 * ranks[-1], target_modules=names)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    device = next(model.parameters()).device.type
    uncast = disable_input_dtype_casting(adapted, active=autocast)
    uncast.__enter__()

    def loss(batch):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return model_loss(adapted, batch)

    def close():
        uncast.__exit__(None, None, None)
        adapted.unload()
        model.requires_grad_(False)

    trainable = [p for p in adapted.parameters() if p.requires_grad]
    return {"weights": _trainer(trainable, loss, graph)}, close


def peft_bf16(model, ranks):
    """PEFT's LoRA of the largest rank, adapters in bfloat16."""
    return _peft(model, ranks, autocast_adapter_dtype=False)


def peft_bf16_graph(model, ranks):
    """The same, the whole step as one CUDA graph."""
    return _peft(model, ranks, autocast_adapter_dtype=False, graph=True)


def peft_float32(model, ranks):
    """PEFT's default, float32 adapters."""
    return _peft(model, ranks, autocast_adapter_dtype=True)


def peft_autocast(model, ranks):
    """Float32 adapters under autocast, as a Trainer with bf16=True runs them."""
    return _peft(model, ranks, autocast_adapter_dtype=True, autocast=True)


def _ours(model, ranks, *, branches: str, graphs=False, dtype="float32"):
    config = SearchConfig(ranks, branches=branches, budget_rank=ranks[1], adapter_dtype=dtype)
    supernet = Supernet(model, config)
    accelerator = Accelerator(cpu=next(model.parameters()).device.type == "cpu")
    training = TrainingConfig(learning_rate=1e-4, lr_scheduler="constant", max_grad_norm=0.0)
    weights = WeightStep(supernet, accelerator, training, model_loss)
    architect, loss = Architect(supernet, 10**9), partial(model_loss, model)
    path = partial(architect.path, loss)
    if graphs:
        pool = torch.cuda.graph_pool_handle()
        weights.graphed = Graphed(weights.gradients, pool=pool)
        path = Graphed(path, pool=pool)

    def weight_step(batch):
        weights.step(iter([batch]))
        architect.mean.update()

    def architecture_step(batch):
        with architect.mean.in_place():
            path(batch)

    return _bilevel(weight_step, architecture_step), supernet.remove


def _bilevel(weight_step, architecture_step) -> dict:
    def both(batch):
        weight_step(batch)
        architecture_step(batch)

    return {"weights": weight_step, "architecture": architecture_step, "bilevel": both}


def nested(model, ranks):
    """darts_lora, nested branches."""
    return _ours(model, ranks, branches="nested")


def independent(model, ranks):
    """darts_lora, independent branches."""
    return _ours(model, ranks, branches="independent")


def nested_bf16(model, ranks):
    """darts_lora, nested branches, LoRA weights in bfloat16."""
    return _ours(model, ranks, branches="nested", dtype="bfloat16")


def nested_graphs(model, ranks):
    """darts_lora, nested branches, steps as CUDA graphs."""
    return _ours(model, ranks, branches="nested", graphs=True)


def nested_bf16_graphs(model, ranks):
    """darts_lora, nested branches, LoRA weights in bfloat16, steps as CUDA graphs."""
    return _ours(model, ranks, branches="nested", graphs=True, dtype="bfloat16")


def independent_graphs(model, ranks):
    """darts_lora, independent branches, steps as CUDA graphs."""
    return _ours(model, ranks, branches="independent", graphs=True)


def _compiled(method, model, ranks):
    """Another way's steps with each of the model's blocks compiled by torch.compile."""
    steps, close = method(model, ranks)
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for block in blocks:
        block.compile()

    def close_both():
        for block in blocks:
            block._compiled_call_impl = None  # as Module.compile has no inverse
        torch.compiler.reset()
        close()

    return steps, close_both


def peft_bf16_compiled(model, ranks):
    """PEFT's LoRA, adapters in bfloat16, blocks compiled."""
    return _compiled(peft_bf16, model, ranks)


def nested_bf16_compiled(model, ranks):
    """darts_lora, nested branches, LoRA weights in bfloat16, blocks compiled."""
    return _compiled(nested_bf16, model, ranks)


class _Mixed(nn.Module):
    """A base layer and a mixture by softmax(alpha), in one of two slow ways."""

    def __init__(self, base: nn.Module, ranks: list[int]):
        super().__init__()
        self.base, self.ranks = base, ranks
        factory = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.alpha = nn.Parameter(torch.zeros(len(ranks), device=base.weight.device))
        self.build(base.in_features, base.out_features, factory)

    def weights(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name.startswith("lora")]


class _Pairs(_Mixed):
    """A pair of Linears for each branch: y = W x + s sum_k p_k B_k (A_k x)."""

    def build(self, width_in, width_out, factory):
        self.lora_A = nn.ModuleList(nn.Linear(width_in, r, False, **factory) for r in self.ranks)
        self.lora_B = nn.ModuleList(nn.Linear(r, width_out, False, **factory) for r in self.ranks)

    def forward(self, x):
        y, p = self.base(x), self.alpha.softmax(0).to(x.dtype)
        for k, (a, b) in enumerate(zip(self.lora_A, self.lora_B, strict=True)):
            y = y + 2 * p[k] * b(a(x))
        return y


class _Clones(_Mixed):
    """One A and B of the largest rank, as in the published search: y = W x + B' A' x with
    A' = sum_k p_k (m_k * A), B' likewise; each branch clones a weight, zeroes it outside of the
    branch and scales it inside. m_k: the r_k middle rows of A, or columns of B."""

    def build(self, width_in, width_out, factory):
        largest = max(self.ranks)
        self.lora_A = nn.Parameter(torch.randn(largest, width_in, **factory) / width_in**0.5)
        self.lora_B = nn.Parameter(torch.zeros(width_out, largest, **factory))

    def forward(self, x):
        p = self.alpha.softmax(0).to(x.dtype)
        a, b = self._mixed(self.lora_A, 0, p), self._mixed(self.lora_B, 1, p)
        return self.base(x) + 2 * F.linear(F.linear(x, a), b)

    def _mixed(self, weight, dim, p):
        total, size = torch.zeros_like(weight), weight.shape[dim]
        for rank, share in zip(self.ranks, p, strict=True):
            start, part = (size - rank) // 2, weight.clone()
            part.narrow(dim, 0, start).zero_()
            part.narrow(dim, start + rank, size - start - rank).zero_()
            part.narrow(dim, start, rank).mul_(share)
            total = total.add_(part)
        return total


def _other(model, ranks, layer_class, *, apart=True):
    """With `apart` each step computes gradients of what it trains alone."""
    head = model.get_output_embeddings()
    targets = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    layers = {name: layer_class(module, ranks) for name, module in targets.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    weights = [p for layer in layers.values() for p in layer.weights()]
    alphas = [layer.alpha for layer in layers.values()]

    def close():
        for name, module in targets.items():
            model.set_submodule(name, module)

    def only(trained, step):
        def run(batch):
            for parameter in (*weights, *alphas):
                parameter.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            step(batch)

        return run

    def loss(batch):
        return model_loss(model, batch)

    steps = [(weights, _trainer(weights, loss)), (alphas, _trainer(alphas, loss))]
    return _bilevel(*(only(*step) if apart else step[1] for step in steps)), close


def pairs(model, ranks):
    """A pair of Linears for each branch."""
    return _other(model, ranks, _Pairs)


def clones(model, ranks):
    """Masked clones for each branch, as the published search computes them: its loop computes the
    gradients of weights and alphas in both steps."""
    return _other(model, ranks, _Clones, apart=False)


def clones_apart(model, ranks):
    """Masked clones, each step with the gradients that it needs."""
    return _other(model, ranks, _Clones)


METHODS = {
    method.__name__: method
    for method in (
        forward_only, frozen, peft_bf16, peft_float32, peft_autocast, nested_bf16, nested,
        independent, peft_bf16_graph, nested_bf16_graphs, nested_graphs,
        independent_graphs, peft_bf16_compiled, nested_bf16_compiled, pairs,
        clones, clones_apart,
    )
}  # fmt: skip
