"""Supernet: puts the layers into a model, samples all gates once a forward, gives the two parameter
groups, takes the layers out again. Not here: arithmetic of a layer, or any optimizer."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from einops import einsum
from safetensors.torch import save_file
from torch import Tensor, nn

from darts_lora.base.errors import InputError
from darts_lora.base.files import write_whole
from darts_lora.config import SearchConfig
from darts_lora.lora.branches import Forward
from darts_lora.lora.cost import resolve_budget, unit_costs, usable_table
from darts_lora.lora.experts import MixedRankExperts
from darts_lora.lora.frozen import hold_statistics
from darts_lora.lora.handover import cut, fold
from darts_lora.lora.mixed_linear import MixedRankLinear
from darts_lora.lora.probe import check_plain
from darts_lora.lora.relaxation import even
from darts_lora.lora.searched import searched_layers
from darts_lora.lora.sharded import full, shard_as
from darts_lora.lora.targets import match_saved_modules

SUPERNET_NAME = "supernet.safetensors"
# What accelerate puts into a model that it prepares, and does not take away; and what is put here.
PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")
MARKS = (*PREPARED, "save_pretrained", "_hf_peft_config_loaded")


class Supernet:
    """A model whose target layers hold rank branches and alphas; all else is frozen, but the
    modules of config.modules_to_save: copies of them are trained in full, as in PEFT.

    In every forward the gates are the mean ones of the even distribution, whose mean rank is that
    of the budget: what is trained is a plain LoRA, whose columns have these constants. An
    architecture step sets others for its own forwards (`probing`).
    The model's save_pretrained writes the supernet's state alone, as supernet.safetensors, which
    `load_state_dict` takes.

    Args:
        model: any module; its first tensor input (or `input_ids`) has the batch's rows in front.
        config: the search's options.

    Attributes:
        layers: name -> MixedRankLinear, or of a parameter of experts MixedRankExperts, in the
            model's order (N of them).
        left_out: name of each match that is not searched -> why, in words.
        alpha: (N, K) float32 parameter, the architecture weights of all layers. It is no part of
            the model: what wraps or shards the model leaves it whole. `layer.alpha` is a row of it.
        held: (N, K) float32 logits of the even distribution, which the gates follow.
        saved_modules: name -> module that is trained in full; the budget does not count it.
        layer_ranks: (N, K) float64, each candidate as it is on a layer (usable_ranks).
        unit_costs: (N,) float64, trainable parameters of one rank.
        costs: (N, K) float64, trainable parameters of each candidate.
        budget: trainable parameters.
        sizes: uniform ranks whose losses tell how large the budget should be, with 0, the base
            model; empty where a budget is given.
        price: of a parameter in alpha (relaxation.py), in 1 / parameters.
        calls: forwards of the model so far (count).

    Raises:
        InputError: no target matches, a target is not a linear layer or shares its weight, a rank
            or the budget does not fit the layers; the model has adapters or rank branches, or is
            compiled.
    """

    def __init__(self, model: nn.Module, config: SearchConfig):
        self.model, self.config = model, config
        check_plain(model)
        saved = match_saved_modules(model, config.modules_to_save)
        shapes, self.left_out = searched_layers(model, config, saved)
        self.layer_ranks = usable_table(shapes.values(), config.ranks)
        self.unit_costs = unit_costs(shapes.values())
        self.costs = self.unit_costs[:, None] * self.layer_ranks
        self.parameters_per_rank = int(self.unit_costs.sum())
        budget_rank, budget_parameters = config.budget_rank, config.budget_parameters
        self.sizes: tuple[int, ...] = ()
        if budget_rank is None and budget_parameters is None:
            budget_rank, self.sizes = max(config.ranks) / 2, (0, *filter(None, config.ranks))
        self.budget = resolve_budget(
            self.costs, self.parameters_per_rank, budget_rank, budget_parameters
        )
        self.price = 0.0

        self._marks = {n: v for n, v in vars(model).items() if n in MARKS}
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        self.layers: dict[str, MixedRankLinear | MixedRankExperts] = {}
        self._originals: dict[str, nn.Module] = {}
        devices = {p.device for p in model.parameters() if p.is_cuda}
        with torch.random.fork_rng(devices):  # the caller's random state is not ours to move
            torch.default_generator.manual_seed(config.seed)
            for device in devices:  # torch.manual_seed would seed those of other models too
                torch.cuda.default_generators[device.index].manual_seed(config.seed)
            for name in shapes:
                self._put_in(name)
        for name in saved:
            self._originals[name] = model.get_submodule(name)
        self.saved_modules = {name: _trainable_copy(name, self._originals[name]) for name in saved}
        for name, module in self.saved_modules.items():
            model.set_submodule(name, module)
        self.calls = 0
        self._shared = Forward()
        layers = self.layers.values()
        self.alpha = nn.Parameter(torch.stack([layer.alpha.detach() for layer in layers]))
        for layer in layers:
            del layer.alpha
            layer.shared = self._shared
        self.held = even(self.layer_ranks, self.costs, self.budget).float()
        self.alpha.data.copy_(self.held)
        self._place_alpha(self.alpha.device)
        self._probe: Callable[[int], Tensor] | None = None
        pretrained: Any = model  # whose attributes a Module does not know
        if hasattr(pretrained, "save_pretrained"):
            pretrained.save_pretrained = self._save
        if getattr(pretrained, "is_quantized", False):
            pretrained._hf_peft_config_loaded = (
                True  # trainers refuse quantized models without adapters
            )
        self._hooks = [
            model.register_forward_pre_hook(self._set_gates, with_kwargs=True),
            model.register_forward_hook(lambda *_: self._shared.check()),
            model.register_forward_hook(lambda *_: self._shared.forget(), always_call=True),
            *hold_statistics(model, self.saved_modules.values()),
        ]

    def _put_in(self, name: str) -> None:
        """A layer of rank branches in the place of the linear layer, or around the experts."""
        config, modules = self.config, dict(self.model.named_modules())
        options = {
            "scaling": config.scaling,
            "dtype": getattr(torch, config.adapter_dtype),
        }
        owner, _, parameter = name.rpartition(".")
        layer: MixedRankLinear | MixedRankExperts
        if name in modules:
            owner, base = name, modules[name]
            layer = MixedRankLinear(base, config.ranks, dropout=config.dropout, **options)
        else:
            base = modules[owner]
            layer = MixedRankExperts(base, parameter, config.ranks, **options)
        self._originals.setdefault(owner, base)
        self.model.set_submodule(owner, layer)
        self.layers[name] = layer

    def _set_gates(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls += 1
        self._follow_weights()
        gates, probing = self._gates, self._probe is not None
        if probing:
            gates = self._probe(_batch_rows(args, kwargs) or 1)
        self._shared.has_gradients = torch.is_grad_enabled()
        each = zip(self.layers.values(), gates.unbind(0), strict=True)
        for layer, own in each:  # past a module's setattr, which is slow
            vars(layer).update(gates=own, trains_weights=not probing)

    def _follow_weights(self) -> None:
        """Move alpha where the layers' weights were moved."""
        device = next(iter(self.layers.values())).lora_A.device
        if self.alpha.device != device:
            self._place_alpha(device)

    def _place_alpha(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Move alpha, its rows in the layers, and what is multiplied with it."""
        self.alpha.data = self.alpha.data.to(device, dtype)
        for layer, row in zip(self.layers.values(), self.alpha.detach(), strict=True):
            layer.alpha = row
        self.held = self.held.to(self.alpha)
        membership = torch.stack([layer.membership for layer in self.layers.values()])
        membership = self.config.scaling * membership.to(self.alpha)
        self._gates = einsum(self.held.softmax(-1), membership, "n k, n r k -> n r")

    @contextlib.contextmanager
    def probing(self, gates: Callable[[int], Tensor]):
        """Forwards inside have other gates, and their losses no gradients of the weights.

        Args:
            gates: rows of a batch -> (N, R), or (N, rows, R) with a row for each example; called
                once for each number of rows, so that all forwards of one loss have the same.
        """
        self._probe = cache(gates)
        try:
            yield
        finally:
            self._probe = None

    @contextlib.contextmanager
    def in_directions(self):
        """Inside, the columns of each layer are the singular directions of its mean mixture, the
        largest first, and the layer is the same with gates of `scaling` (handover.py); behind it
        A and B are what they were, bit for bit."""
        weights = [w for layer in self.layers.values() for w in (layer.lora_A, layer.lora_B)]
        kept = [w.detach().clone() for w in weights]
        try:
            for layer, gates in zip(self.layers.values(), self._gates, strict=True):
                a, b = full(layer.lora_A.detach()), full(layer.lora_B.detach())
                most = min(layer.used, *layer.shape[-2:])
                new_a, new_b = cut(a, fold(b, gates / self.config.scaling), most)
                missing = a.shape[-2] - most
                for weight, value in (
                    (layer.lora_A, nn.functional.pad(new_a, (0, 0, 0, missing))),
                    (layer.lora_B, nn.functional.pad(new_b, (0, missing))),
                ):
                    weight.data.copy_(shard_as(weight, value.to(weight.dtype)))
            yield
        finally:
            for weight, value in zip(weights, kept, strict=True):
                weight.data.copy_(value)

    def weight_parameters(self) -> list[nn.Parameter]:
        """A and B of every layer, and the saved modules: what the weight step trains."""
        lora = [p for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)]
        return lora + [p for module in self.saved_modules.values() for p in module.parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        """`<name>.lora_A`, `<name>.lora_B`, `<name>.alpha` of every layer, and the saved modules'
        tensors under the model's own names, not copied; `<name>.gates` (R,) follows from them: the
        mean gates of the columns, which make a plain LoRA of the layer (handover.py)."""
        state = {
            f"{name}.{part}": getattr(layer, part).detach()
            for name, layer in self.layers.items()
            for part in ("lora_A", "lora_B", "alpha")
        }
        gates = self.mean_gates() / self.config.scaling
        state |= {f"{name}.gates": row for name, row in zip(self.layers, gates, strict=True)}
        for name, module in self.saved_modules.items():
            state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy in what state_dict gave.

        Raises:
            InputError: names or shapes are not those of this supernet.
        """
        self._follow_weights()  # before what belongs to alpha is loaded: its optimizer
        own = self.state_dict()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in state.items()}:
            raise InputError("supernet state: names or shapes are not those of this supernet")
        for key, value in own.items():
            value.copy_(state[key])

    def _save(
        self, save_directory: str, is_main_process: bool = True, state_dict=None, **options
    ) -> None:
        """The model's save_pretrained while it is searched, as a trainer calls it: layers under
        other names would be taken for missing, and made anew, by from_pretrained."""
        if is_main_process:
            whole = state_dict or {}  # of a sharded model
            state = {n: whole.get(n, v) for n, v in self.state_dict().items()}
            state = {n: v.contiguous().cpu() for n, v in state.items()}
            path = os.path.join(save_directory, SUPERNET_NAME)
            write_whole(path, lambda temporary: save_file(state, temporary))

    def mean_gates(self) -> Tensor:
        """Gates of every layer's columns, (N, R) float32: the scaling times the probability that
        the even distribution gives a column."""
        return self._gates

    def probabilities(self) -> Tensor:
        """softmax(alpha) of every layer, (N, K) float32."""
        return self.alpha.detach().softmax(-1)

    def expected_parameters(self) -> Tensor:
        """Trainable parameters that alpha expects, scalar."""
        probabilities = self.probabilities()
        return (probabilities * self.costs.to(probabilities)).sum()

    def remove(self) -> nn.Module:
        """Put the original modules back: the model is what it was, bit for bit; `layers` and
        `saved_modules` stay readable."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers.values():
            layer.gates = None
        for name, module in self._originals.items():
            self.model.set_submodule(name, module)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
        for name in MARKS:
            vars(self.model).pop(name, None)
        vars(self.model).update(self._marks)
        return self.model


def _trainable_copy(name: str, module: nn.Module) -> nn.Module:
    # Weights of torchao call themselves floating point, but are of a class of their own.
    if any(type(p) is not nn.Parameter or not p.is_floating_point() for p in module.parameters()):
        raise InputError(f"modules_to_save: {name} has quantized weights, which cannot be trained")
    if any(p.dtype == torch.float16 for p in module.parameters()):
        raise InputError(
            f"modules_to_save: {name} is in float16, too coarse to be trained; load the model in "
            "bfloat16 or float32 (dtype)"
        )
    return copy.deepcopy(module).requires_grad_(True)


def _batch_rows(args: tuple, kwargs: dict) -> int | None:
    """Rows of the batch: the leading size of the first tensor; the text's, not the images'."""
    named = [kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return None
