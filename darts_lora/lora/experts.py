"""MixedRankExperts: experts whose weights are one 3-D parameter, and their rank branches; which
parameters of a model are such. Not here: branches in general (branches.py), linear layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from darts_lora.base.errors import InputError
from darts_lora.lora.branches import RankBranches

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def stacked_tensors(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Name of each 3-D parameter that PEFT's target_parameters can adapt -> (experts, in, out).

    Those of torch's own modules (convolutions) and of the model itself are none; nor are
    quantized ones. As in PEFT, a module whose `is_transposed` is true holds (experts, in, out),
    any other (experts, out, in).
    """
    found = {}
    for name, module in model.named_modules():
        if not name or isinstance(module, RankBranches):
            continue
        if type(module).__module__.startswith("torch.nn."):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.dtype in FLOATING:
                found[f"{name}.{key}"] = _shape(module, parameter)
    return found


def expert_tensors(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """The stacked tensors that are experts' weights, by the name of their module or its class."""
    found = {}
    for name, shape in stacked_tensors(model).items():
        owner = name.rpartition(".")[0]
        kind = type(model.get_submodule(owner)).__name__
        if shape[0] > 1 and "expert" in f"{owner} {kind}".lower():
            found[name] = shape
    return found


def _shape(module: nn.Module, parameter: Tensor) -> tuple[int, int, int]:
    experts, first, second = parameter.shape
    transposed = getattr(module, "is_transposed", False)
    return (experts, first, second) if transposed else (experts, second, first)


class MixedRankExperts(RankBranches):
    """A module of experts, one of whose 3-D parameters W gets K low-rank branches for each expert
    e, with one choice of rank for all:

        W_e + B_e diag(g) A_e,    g = s * M p

    with A (experts, R, in), B (experts, out, R) and the rest as of MixedRankLinear. The sum is
    computed once a forward, as by PEFT, in the dtype of W. Experts see tokens of all rows mixed, so
    of gates of one row per example the first row's serve all of them.

    Args:
        base_layer: the module that holds the parameter, or the MixedRankExperts of another
            parameter of it; its forward is called with the sum in the parameter's place.
        parameter_name: of the 3-D parameter.
        ranks, scaling: of RankBranches.
        dtype: of A and B.

    Raises:
        InputError: unusable ranks or scaling; no such parameter.
    """

    base_layer: nn.Module

    def __init__(
        self,
        base_layer: nn.Module,
        parameter_name: str,
        ranks: list[int] | tuple[int, ...],
        *,
        scaling: float = 2.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        experts, path = base_layer, parameter_name
        while isinstance(experts, MixedRankExperts):
            experts, path = experts.base_layer, f"base_layer.{path}"
        weight = experts._parameters.get(parameter_name)
        if weight is None or weight.dim() != 3:
            kind = type(experts).__name__
            raise InputError(f"base_layer: a {kind} has no 3-D parameter {parameter_name!r}")
        self.parameter_name, self._path = parameter_name, path
        self.is_transposed = bool(getattr(experts, "is_transposed", False))
        self.base_layer = base_layer
        experts.requires_grad_(False)
        shape = _shape(experts, weight)
        self.num_experts, self.in_features, self.out_features = shape
        self._set_branches(shape, ranks, scaling, weight.device)
        columns, device = len(self.membership), weight.device
        a = torch.zeros(self.num_experts, columns, self.in_features, device=device)
        bound = 1 / math.sqrt(self.in_features)  # of kaiming_uniform_ with a=sqrt(5), as PEFT
        nn.init.uniform_(a[:, : self.used], -bound, bound)
        self.lora_A = nn.Parameter(a.to(dtype))
        b = torch.zeros(self.num_experts, self.out_features, columns, device=device, dtype=dtype)
        self.lora_B = nn.Parameter(b)

    def forward(self, *args, **kwargs):
        """What the experts' own forward gives with the adapted weights."""
        return functional_call(self.base_layer, {self._path: self.adapted()}, args, kwargs)

    def adapted(self) -> Tensor:
        """W plus the mixture, in the shape and dtype of W."""
        self.note_call()
        gates = self.gates
        if gates is None:
            gates = self.scaling * (self.membership @ self.probabilities())
        gates = gates if gates.dim() == 1 else gates[0]
        a: Tensor = self.lora_A
        b: Tensor = self.lora_B
        weight = self.weight
        if not self.trains_weights:
            a, b = a.detach(), b.detach()
        left, right = (b * gates).to(weight.dtype), a.to(weight.dtype)
        if self.is_transposed:
            left, right = right.mT, left.mT
        return torch.baddbmm(weight, left, right)

    @property
    def weight(self) -> Tensor:
        """The base's 3-D parameter."""
        return self.base_layer.get_parameter(self._path)


def to_peft(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A (experts, r, in) and B (experts, out, r) as PEFT stores them for a 3-D parameter,
    (experts * r, in) and (out, r * experts); those of linear layers stay as they are."""
    if a.dim() == 2:
        return a, b
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def peft_names(names: list[str], stacked: set[str]) -> dict[str, str]:
    """Name of each adapted layer or parameter -> that of the module in which PEFT keeps its A and
    B: of several parameters of one module, the last is adapted by the outermost module.

    Args:
        names: in the model's order.
        stacked: those that are 3-D parameters.
    """
    found: dict[str, str] = {}
    around: dict[str, str] = {}
    for name in reversed(names):
        if name not in stacked:
            found[name] = name
            continue
        owner = name.rpartition(".")[0]
        found[name] = around.get(owner, owner)
        around[owner] = f"{found[name]}.base_layer"
    return {name: found[name] for name in names}
