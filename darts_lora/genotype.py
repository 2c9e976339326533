"""Genotype: the result of a search; JSON; to PEFT; searched weights for a warm start.
Not here: how ranks are chosen (discretize.py) and retrained (finetune.py)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from darts_lora.alpha.sizes import check_sizes
from darts_lora.base.bounds import MAX_RANK, NAMES, check_ranks, is_name, is_real
from darts_lora.base.errors import InputError, told_as
from darts_lora.base.files import read_json, write_json
from darts_lora.lora.adapter import lora_config, save_fresh
from darts_lora.lora.cost import parameters_per_rank
from darts_lora.lora.experts import peft_names, stacked_tensors, to_peft
from darts_lora.lora.handover import cut, fold
from darts_lora.lora.mixed_linear import linear_shape
from darts_lora.lora.models import weights_digest
from darts_lora.lora.parts import task_type
from darts_lora.lora.targets import check_matches, current_names

if TYPE_CHECKING:
    from darts_lora.supernet import Supernet

VERSION = 1
MAX_SIZE = 2**31 - 1  # of a layer's side
PEFT_PREFIX = "base_model.model."


@dataclass
class Genotype:
    """One rank for every searched layer.

    Raises:
        InputError: a field holds something else than its docstring says. Module names are dotted,
            no part empty, of printable characters: they go to the screen and into regular
            expressions (escaped), never into paths.
    """

    ranks: dict[str, int]
    """Module name -> rank; 0: the layer gets no adapter."""
    scaling: float = 2.0
    """lora_alpha / r, the same for every layer."""
    shapes: dict[str, tuple[int, ...]] | None = None
    """Module name -> (in_features, out_features); name of a 3-D parameter of experts -> (experts,
    in_features, out_features). None where only ranks are known."""
    candidates: list[int] | None = None
    """The candidate ranks of the search."""
    probabilities: dict[str, list[float]] | None = None
    """Module name -> probability of each candidate at the end of the search."""
    modules_to_save: list[str] = field(default_factory=list)
    """Names of the modules that are trained in full and saved with the adapter."""
    base_model: str | None = None
    """Hub name or path of the model that was searched."""
    found_by: dict[str, Any] = field(default_factory=dict)
    """How it was found: method, budget, steps, seed, versions."""

    def __post_init__(self):
        ok = isinstance(self.ranks, dict) and bool(self.ranks)
        _require(ok, "ranks", self.ranks, "must map module names to integers >= 0")
        for name, rank in self.ranks.items():
            ok = type(rank) is int and 0 <= rank <= MAX_RANK
            _require(
                ok, "ranks", {name: rank}, f"must map module names to integers, 0 to {MAX_RANK}"
            )
            _require(is_name(name), "ranks", {name: rank}, "must map " + NAMES)
        ok = type(self.scaling) in (int, float) and 0 < self.scaling < 1e30
        _require(ok, "scaling", self.scaling, "must be a number above 0")
        saved = self.modules_to_save
        ok = isinstance(saved, list) and all(map(is_name, saved))
        _require(ok, "modules_to_save", saved, "must be a list of " + NAMES)
        ok = self.base_model is None or isinstance(self.base_model, str)
        _require(ok, "base_model", self.base_model, "must be the name of a model")
        self._check_search()

    def _check_search(self) -> None:
        """What only a search knows: shapes, candidates, probabilities, its budget."""
        if self.candidates is not None:
            ok = list(check_ranks(self.candidates)) == self.candidates
            _require(ok, "candidates", self.candidates, "must be a list of ranks that rise")
        lengths = {"shapes": (2, 3), "probabilities": (len(self.candidates or ()),)}
        for option, allowed in lengths.items():
            table = getattr(self, option)
            if table is None:
                continue
            ok = isinstance(table, dict) and table.keys() == self.ranks.keys()
            length = " or ".join(map(str, allowed))
            _require(ok, option, table, f"must give {length} numbers for every module of ranks")
            for name, row in table.items():
                ok = isinstance(row, list | tuple) and len(row) in allowed
                ok = ok and (_is_shape(row) if option == "shapes" else _is_distribution(row))
                kind = "sizes of at least 1" if option == "shapes" else "parts of 1"
                rule = f"must give {length} numbers for every module of ranks, {kind}"
                _require(ok, option, {name: row}, rule)
        if self.shapes is not None:
            self.shapes = {name: tuple(shape) for name, shape in self.shapes.items()}
            for name, rank in self.ranks.items():
                larger = max(self.shapes[name][-2:])
                rule = f"must be at most {larger}, the larger side of the layer"
                _require(rank <= larger, "ranks", {name: rank}, rule)
        _require(isinstance(self.found_by, dict), "found_by", self.found_by, "must be a mapping")
        value = self.found_by.get("verdict", {})
        _require(isinstance(value, dict), "verdict", value, "must be a mapping")
        budget = self.found_by.get("budget_parameters")
        ok = budget is None or (type(budget) in (int, float) and 0 <= budget < 1e30)
        _require(ok, "budget_parameters", budget, "must be a number >= 0")
        price = self.found_by.get("price", 0)
        _require(is_real(price), "price", price, "must be a number")
        check_sizes(self.found_by.get("sizes"))

    @classmethod
    def from_supernet(cls, supernet: Supernet) -> Genotype:
        """The most probable rank of each of the supernet's layers, and all that led to it."""
        with torch.no_grad():
            probabilities = supernet.alpha.double().softmax(-1).cpu()
        names = list(supernet.layers)
        model_config = getattr(supernet.model, "config", None)
        return cls(
            ranks={
                name: int(ranks[k])
                for name, ranks, k in zip(
                    names, supernet.layer_ranks, probabilities.argmax(-1), strict=True
                )
            },
            scaling=supernet.config.scaling,
            shapes={name: layer.shape for name, layer in supernet.layers.items()},
            candidates=list(supernet.config.ranks),
            probabilities=dict(zip(names, probabilities.tolist(), strict=True)),
            modules_to_save=list(supernet.saved_modules),
            base_model=getattr(model_config, "_name_or_path", None) or None,
            found_by={
                "budget_parameters": supernet.budget,
                "price": supernet.price,
            },
        )

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the derived adapter, without modules_to_save.

        Raises:
            InputError: the shapes of the layers are not known (a file with ranks alone).
        """
        if self.shapes is None:
            raise InputError("genotype: holds ranks alone; call with_shapes(model) first")
        return sum(
            rank * parameters_per_rank(*self.shapes[name]) for name, rank in self.ranks.items()
        )

    @property
    def stacked(self) -> list[str]:
        """The names that are 3-D parameters of experts; needs shapes to tell."""
        return [name for name, shape in (self.shapes or {}).items() if len(shape) == 3]

    def with_shapes(self, model: nn.Module) -> Genotype:
        """This genotype with module names and shapes of `model`, a fresh object.

        Names from before transformers 5 are mapped by the model's own renaming of old checkpoints.

        Raises:
            InputError: a module is not in the model, or is not a linear layer.
        """
        stacked = stacked_tensors(model)
        modules = dict(model.named_modules()) | dict.fromkeys(stacked)
        names = dict(zip(self.ranks, current_names(self.ranks, modules, model), strict=True))
        shapes = {name: linear_shape(module) for name, module in modules.items()}
        linear: dict[str, tuple[int, ...]] = {n: s for n, s in shapes.items() if s is not None}
        linear |= stacked
        missing = [old for old, new in names.items() if new not in linear]
        if missing:
            raise InputError(
                f"genotype: {len(missing)} of its {len(names)} modules are no linear layers of the "
                f"model, first {missing[0]!r}; is it the model that was searched "
                f"({self.base_model or 'unknown'})?"
            )
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        if twice:
            raise InputError(f"genotype: two of its names are of one module, {twice[0]!r}")
        renamed = {**asdict(self), "ranks": {names[n]: r for n, r in self.ranks.items()}}
        renamed["shapes"] = {new: linear[new] for new in names.values()}
        if self.probabilities is not None:
            renamed["probabilities"] = {names[n]: p for n, p in self.probabilities.items()}
        return Genotype(**renamed)

    def to_lora_config(self, model: nn.Module | None = None, **options) -> LoraConfig:
        """A PEFT LoraConfig that gives each module its rank, with the same scaling for all.

        The scaling is lora_alpha / r. With `use_rslora=True` it is lora_alpha / sqrt(r) instead, of
        one lora_alpha for all: this genotype's at the mean of the ranks above 0, less above it.

        Args:
            model: where given, every module must be in it and every key must match one module.
            options: further LoraConfig fields (lora_dropout, task_type ...).

        Raises:
            InputError: no rank is above 0, a module is missing, or a key matches not one module.
        """
        genotype = self if model is None else self.with_shapes(model)
        ranks = {name: rank for name, rank in genotype.ranks.items() if rank > 0}
        if not ranks:
            raise InputError("genotype: every rank is 0, there is nothing to train")
        stacked = genotype.stacked
        linear = [name for name in ranks if name not in stacked]
        if model and linear and all(hasattr(model.get_submodule(name), "nx") for name in linear):
            options.setdefault("fan_in_fan_out", True)  # transformers' Conv1D stores W transposed
        if self.modules_to_save:
            options.setdefault("modules_to_save", list(self.modules_to_save))  # PEFT extends it
        config = lora_config(ranks, stacked, self.scaling, model, **options)
        if model is not None:
            check_matches(model, config, ranks, genotype.modules_to_save)
        return config

    def save_untrained(self, base: nn.Module, folder: str | os.PathLike) -> None:
        """An adapter of these ranks as PEFT begins it (B = 0), in PEFT's format: what trainers that
        know one rank alone resume from. `base` stays as it is.

        Raises:
            InputError: as to_lora_config's, or the folder cannot be written.
        """
        genotype = self.with_shapes(base)
        config = genotype.to_lora_config(base, task_type=task_type(base))
        save_fresh(base, config, genotype.ranks, genotype.modules_to_save, folder)

    def inherited_state(self, source: Supernet | str | os.PathLike) -> dict[str, Tensor]:
        """The searched weights, for peft.set_peft_model_state_dict: of each layer's mean mixture
        the best LoRA of the genotype's rank (handover.py).

        Args:
            source: the supernet, or the supernet.safetensors that a search left.

        Returns:
            `base_model.model.<name>.lora_A.weight` (rank, in) and `...lora_B.weight` (out, rank)
            of every adapted module, and the weights of modules_to_save; in the supernet's dtype, on
            its device.

        Raises:
            InputError: the file cannot be read, is of another search, or a module or rank is not in
                the supernet.
        """
        if isinstance(source, str | os.PathLike):
            searched = read_tensors(source, "searched weights")
            self._check_search_of(searched, os.fspath(source))
        else:
            searched = source.state_dict()
        adapted = [name for name, rank in self.ranks.items() if rank > 0]
        state, places = {}, peft_names(adapted, set(self.stacked))
        for name, rank in self.ranks.items():
            if f"{name}.gates" not in searched:
                raise InputError(f"genotype: module {name!r} is not in the supernet")
            if rank > 0:
                a, b, gates = (searched[f"{name}.{p}"] for p in ("lora_A", "lora_B", "gates"))
                cut_a, cut_b = (w.to(a.dtype) for w in cut(a, fold(b, gates), rank))
                for part, value in zip("AB", to_peft(cut_a, cut_b), strict=True):
                    state[f"{PEFT_PREFIX}{places[name]}.lora_{part}.weight"] = value.contiguous()
        saved = tuple(f"{name}." for name in self.modules_to_save)
        for key, value in searched.items():
            if key.startswith(saved) and saved:
                state[f"{PEFT_PREFIX}{key}"] = value.detach().clone()
        return state

    def _check_search_of(self, searched: dict[str, Tensor], path: str) -> None:
        """A genotype that was derived from one search may lie beside the weights of the next."""
        digest = self.found_by.get("supernet_digest")
        if digest is not None and digest != weights_digest(searched):
            raise InputError(
                f"genotype: is of another search than the weights in {path!r}; derive it anew from "
                "the search that is there (recipes/derive.py), or use init=scratch"
            )

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
            return cls._from_content(read_json(path))
        except InputError as error:
            reason = str(error).removeprefix("genotype: ")
            raise InputError(f"genotype {os.fspath(path)!r}: {reason}") from error

    @classmethod
    def _from_content(cls, content: Any) -> Genotype:
        if not isinstance(content, dict):
            raise InputError(f"holds a {type(content).__name__}, not a genotype")
        if "version" not in content:
            ranks = {name.removeprefix(PEFT_PREFIX): rank for name, rank in content.items()}
            if len(ranks) < len(content):
                raise InputError(f"a module stands there with and without {PEFT_PREFIX!r}")
            return cls(ranks)
        version = content.pop("version")
        if type(version) is not int or version != VERSION:
            raise InputError(f"version {version!r:.100}; this release reads {VERSION}")
        unknown = content.keys() - cls.__dataclass_fields__
        if unknown:
            raise InputError(
                f"{min(unknown)!r:.100} is not known; a genotype has "
                f"{', '.join(cls.__dataclass_fields__)}"
            )
        return cls(**{"ranks": None, **content})


def read_tensors(path: str | os.PathLike, name: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file; raises InputError, which calls it by `name`."""
    with told_as(f"{name} {os.fspath(path)!r}: cannot be read", OSError, SafetensorError):
        return load_file(path)


def _require(ok: bool, option: str, value: Any, rule: str) -> None:
    if not ok:
        raise InputError(f"genotype: {option}={value!r:.100}: {rule}")


def _is_shape(row: Iterable) -> bool:
    return all(type(size) is int and 0 < size <= MAX_SIZE for size in row)


def _is_distribution(row: Iterable) -> bool:
    numbers = all(type(share) in (int, float) and 0 <= share <= 1 for share in row)
    return numbers and abs(sum(row) - 1) < 1e-3
