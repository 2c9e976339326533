"""Genotype: the result of a search; JSON; to PEFT; searched weights for a warm start.
Not here: how ranks are chosen (discretize.py) and retrained (finetune.py)."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from darts_lora.errors import InputError
from darts_lora.files import write_json
from darts_lora.mixed_linear import branch_columns, linear_shape

if TYPE_CHECKING:
    from darts_lora.supernet import Supernet

VERSION = 1
PEFT_PREFIX = "base_model.model."


@dataclass
class Genotype:
    """One rank for every searched layer.

    Raises:
        InputError: ranks are not names -> integers >= 0, or the scaling is not above 0.
    """

    ranks: dict[str, int]
    """Module name -> rank; 0: the layer gets no adapter."""
    scaling: float = 2.0
    """lora_alpha / r, the same for every layer."""
    shapes: dict[str, tuple[int, int]] | None = None
    """Module name -> (in_features, out_features); None where only ranks are known."""
    candidates: list[int] | None = None
    """The candidate ranks of the search."""
    branches: Literal["independent", "nested"] = "independent"
    """How the search's weights were shared between ranks."""
    probabilities: dict[str, list[float]] | None = None
    """Module name -> probability of each candidate at the end of the search."""
    modules_to_save: list[str] = field(default_factory=list)
    """Names of the modules that are trained in full and saved with the adapter."""
    base_model: str | None = None
    """Hub name or path of the model that was searched."""
    found_by: dict[str, Any] = field(default_factory=dict)
    """How it was found: method, budget, steps, seed, versions."""

    def __post_init__(self):
        ok = isinstance(self.ranks, dict) and self.ranks
        for name, rank in self.ranks.items() if ok else ():
            ok = ok and isinstance(name, str) and bool(name) and type(rank) is int and rank >= 0
        if not ok:
            raise InputError("genotype: ranks must map module names to integers >= 0")
        if not (isinstance(self.scaling, int | float) and 0 < self.scaling < float("inf")):
            raise InputError(f"genotype: scaling={self.scaling!r} must be a number above 0")

    @classmethod
    def from_supernet(cls, supernet: Supernet) -> Genotype:
        """The most probable rank of each of the supernet's layers, and all that led to it."""
        candidates = list(supernet.config.ranks)
        with torch.no_grad():
            probabilities = supernet.stacked_alpha().double().softmax(-1).cpu()
        names = list(supernet.layers)
        model_config = getattr(supernet.model, "config", None)
        return cls(
            ranks=dict(zip(names, (candidates[k] for k in probabilities.argmax(-1)), strict=True)),
            scaling=supernet.config.scaling,
            shapes={n: (x.in_features, x.out_features) for n, x in supernet.layers.items()},
            candidates=candidates,
            branches=supernet.config.branches,
            probabilities=dict(zip(names, probabilities.tolist(), strict=True)),
            modules_to_save=list(supernet.saved_modules),
            base_model=getattr(model_config, "_name_or_path", None) or None,
            found_by={"budget_parameters": supernet.budget},
        )

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the derived adapter, without modules_to_save.

        Raises:
            InputError: the shapes of the layers are not known (a file with ranks alone).
        """
        if self.shapes is None:
            raise InputError("genotype: holds ranks alone; call with_shapes(model) first")
        return sum(rank * sum(self.shapes[name]) for name, rank in self.ranks.items())

    @property
    def rank_pattern(self) -> dict[str, int]:
        """PEFT's rank_pattern: one anchored pattern for each adapted module."""
        return {f"^{re.escape(name)}$": rank for name, rank in self.ranks.items() if rank > 0}

    def with_shapes(self, model: nn.Module) -> Genotype:
        """This genotype with module names and shapes of `model`, a fresh object.

        Names from before transformers 5 are mapped by the model's own renaming of old checkpoints.

        Raises:
            InputError: a module is not in the model, or is not a linear layer.
        """
        modules = dict(model.named_modules())
        names = dict(zip(self.ranks, _current_names(self.ranks, modules, model), strict=True))
        linear = {name: linear_shape(module) for name, module in modules.items()}
        linear = {name: shape for name, shape in linear.items() if shape is not None}
        missing = [old for old, new in names.items() if new not in linear]
        if missing:
            raise InputError(
                f"genotype: {len(missing)} of its {len(names)} modules are no linear layers of the "
                f"model, first {missing[0]!r}; is it the model that was searched "
                f"({self.base_model or 'unknown'})?"
            )
        renamed = {**asdict(self), "ranks": {names[n]: r for n, r in self.ranks.items()}}
        renamed["shapes"] = {new: linear[new] for new in names.values()}
        if self.probabilities is not None:
            renamed["probabilities"] = {names[n]: p for n, p in self.probabilities.items()}
        return Genotype(**renamed)

    def to_lora_config(
        self, model: nn.Module | None = None, *, pad_to_max: bool = False, **options
    ) -> LoraConfig:
        """A PEFT LoraConfig that gives each module its rank, with the same scaling for all.

        The scaling is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora=True`; lora_alpha is
        chosen so that it is this genotype's, and constant over the modules, in both.

        Args:
            model: where given, every module must be in it and every key must match one module.
            pad_to_max: the largest rank for every adapted module and no patterns, for engines that
                ignore patterns; pad_to_max_rank makes the weights for it.
            options: further LoraConfig fields (lora_dropout, task_type ...).

        Raises:
            InputError: no rank is above 0, a module is missing, or a key matches not one module.
        """
        genotype = self if model is None else self.with_shapes(model)
        ranks = {name: rank for name, rank in genotype.ranks.items() if rank > 0}
        if not ranks:
            raise InputError("genotype: every rank is 0, there is nothing to train")
        largest = max(ranks.values())
        pattern = {key: rank for key, rank in genotype.rank_pattern.items() if rank != largest}
        pattern = {} if pad_to_max else pattern
        divisor = math.sqrt if options.get("use_rslora") else float
        if model is not None and all(hasattr(model.get_submodule(name), "nx") for name in ranks):
            options.setdefault("fan_in_fan_out", True)  # transformers' Conv1D stores W transposed
        if self.modules_to_save:
            options.setdefault("modules_to_save", list(self.modules_to_save))  # PEFT extends it
        lora_config = LoraConfig(
            r=largest,
            lora_alpha=self.scaling * divisor(largest),
            # a string is matched in full, a list would match suffixes of other names as well
            target_modules="|".join(re.escape(name) for name in ranks),
            rank_pattern=pattern,
            alpha_pattern={key: self.scaling * divisor(rank) for key, rank in pattern.items()},
            **options,
        )
        if model is not None:
            _check_keys(lora_config, ranks, [name for name, _ in model.named_modules()])
        return lora_config

    def inherited_state(self, source: Supernet | str | os.PathLike) -> dict[str, Tensor]:
        """The chosen branches' searched weights, for peft.set_peft_model_state_dict.

        Args:
            source: the supernet, or the supernet.safetensors that a search left.

        Returns:
            `base_model.model.<name>.lora_A.weight` (rank, in) and `...lora_B.weight` (out, rank)
            of every adapted module, and the weights of modules_to_save; in the supernet's dtype, on
            its device.

        Raises:
            InputError: the file cannot be read, or a module or rank is not in the supernet.
        """
        searched = _read_tensors(source) if isinstance(source, str | os.PathLike) else None
        searched = source.state_dict() if searched is None else searched
        state = {}
        for name, rank in self.ranks.items():
            if f"{name}.lora_A" not in searched:
                raise InputError(f"genotype: module {name!r} is not in the supernet")
            if rank > 0:
                columns = branch_columns(tuple(self.candidates or ()), rank, self.branches)
                a, b = searched[f"{name}.lora_A"][columns], searched[f"{name}.lora_B"][:, columns]
                state[f"{PEFT_PREFIX}{name}.lora_A.weight"] = a.detach().clone()
                state[f"{PEFT_PREFIX}{name}.lora_B.weight"] = b.detach().clone()
        saved = tuple(f"{name}." for name in self.modules_to_save)
        for key, value in searched.items():
            if key.startswith(saved) and saved:
                state[f"{PEFT_PREFIX}{key}"] = value.detach().clone()
        return state

    def _repr_html_(self) -> str:
        from darts_lora.tables import html  # a notebook's view: not needed to hold a result

        return html(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON (temporary file, then rename)."""
        write_json(path, {"version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Genotype:
        """Read what save wrote, or a bare "module name -> rank" JSON, as LangVision-LoRA-NAS
        publishes (a prefix "base_model.model." is dropped).

        Raises:
            InputError: the file is missing, truncated, or holds something else.
        """
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"genotype {os.fspath(path)!r}: cannot be read ({error})") from error
        try:
            return cls._from_content(content)
        except InputError as error:
            raise InputError(f"genotype {os.fspath(path)!r}: {error}") from error

    @classmethod
    def _from_content(cls, content: Any) -> Genotype:
        if not isinstance(content, dict):
            raise InputError(f"holds a {type(content).__name__}, not a genotype")
        if "version" not in content:
            return cls({name.removeprefix(PEFT_PREFIX): rank for name, rank in content.items()})
        if content["version"] != VERSION:
            raise InputError(f"version {content['version']!r}; this release reads {VERSION}")
        known = {key: content[key] for key in cls.__dataclass_fields__ if key in content}
        genotype = cls(**{"ranks": None, **known})
        for option, length in (("shapes", 2), ("probabilities", len(genotype.candidates or ()))):
            table = getattr(genotype, option)
            if table is not None and not _is_number_table(table, genotype.ranks, length):
                raise InputError(f"{option} must give {length} numbers for every module of ranks")
        if genotype.shapes is not None:
            genotype.shapes = {name: tuple(shape) for name, shape in genotype.shapes.items()}
        return genotype


def pad_to_max_rank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's weights with zeros up to its largest rank: the same outputs, one rank for all.

    Args:
        state: keys and tensors of an adapter_model.safetensors.
    """
    largest = max(value.shape[0] for key, value in state.items() if ".lora_A." in key)
    padded = {}
    for key, value in state.items():
        if ".lora_A." in key:
            value = F.pad(value, (0, 0, 0, largest - value.shape[0]))
        elif ".lora_B." in key:
            value = F.pad(value, (0, largest - value.shape[1]))
        padded[key] = value
    return padded


def _read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"searched weights {os.fspath(path)!r}: {error}") from error


def _is_number_table(table: Any, names: Iterable[str], length: int) -> bool:
    return (
        isinstance(table, dict)
        and set(table) == set(names)
        and all(isinstance(row, list | tuple) and len(row) == length for row in table.values())
        and all(isinstance(value, int | float) for row in table.values() for value in row)
    )


def _current_names(names: Iterable[str], modules: dict, model: nn.Module) -> list[str]:
    """`names`; those that the model lacks renamed as transformers renames old checkpoints."""
    renamings = []
    if not modules.keys() >= set(names) and isinstance(model, PreTrainedModel):
        renamings = get_model_conversion_mapping(model)
    current = []
    for name in names:
        for renaming in renamings:
            if name in modules:
                break
            name, _ = renaming.rename_source_key(name)
        current.append(name)
    return current


def _check_keys(lora_config: LoraConfig, ranks: dict[str, int], names: list[str]) -> None:
    """Every key of the patterns matches exactly one module, as PEFT matches them."""
    for key in lora_config.rank_pattern:
        compiled = re.compile(rf"(.*\.)?({key})$")
        hits = [name for name in names if compiled.match(name)]
        if len(hits) != 1:
            raise InputError(f"genotype: the pattern {key!r} matches {len(hits)} modules, not one")
    compiled = re.compile(lora_config.target_modules)
    targets = [name for name in names if compiled.fullmatch(name)]
    if set(targets) != set(ranks):
        raise InputError(
            f"genotype: target_modules matches {len(targets)} modules, not {len(ranks)}"
        )
