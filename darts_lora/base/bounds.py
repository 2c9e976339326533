"""What the value of an option must be: numbers within bounds, choices, ranks, module names.
Not here: the options themselves (config.py), nor what needs a model or a data set to check."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Literal, get_args, get_origin, get_type_hints

from darts_lora.base.errors import InputError, told_as

MAX_INT = 2**63 - 1
MAX_RANK = 2**16  # no layer of today's models has one as large
MAX_REAL = 1e30  # far below where float32 ends
MAX_NAME = 1000  # characters; transformers' longest have about 100
NAMES = f"dotted module names, no part empty, of at most {MAX_NAME} printable characters"
MAX_SEED = 2**31 - 1  # NumPy takes 32 bits, and each process adds its number


def require(ok: bool, option: str, value, rule: str) -> None:
    if not ok:
        raise InputError(f"{option}={value!r:.200}: {rule}")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value) -> bool:
    """Whether it is a number that can be computed with; NaN is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_REAL


def is_name(value) -> bool:
    """Whether it can be a module's name: names go to the screen and into regular expressions."""
    ok = isinstance(value, str) and len(value) <= MAX_NAME and value.isprintable()
    return ok and all(value.split("."))


def nearest(name: str, known: Iterable[str]) -> str:
    """Of an unknown name the end of a message: the known one that is most like it, if any is."""
    near = get_close_matches(name, list(known), 1)
    return f"; nearest name: {near[0]}" if near else ""


def check_names(option: str, names) -> None:
    """Raises InputError where a module's name could not stand in a genotype."""
    for name in names:
        require(is_name(name), option, name, f"must match {NAMES}")


def check_bounds(config, *, at_least=None, above=None, choices=None) -> None:
    """Check option -> bound for numbers (None passes where it is the default), every option that is
    annotated as a Literal, and `choices`, those of options whose values are known elsewhere.

    Raises:
        InputError: an option of the dataclass object `config` is out of its bounds.
    """
    for field in fields(config):
        value, largest = getattr(config, field.name), MAX_SEED if "seed" in field.name else MAX_INT
        if _is_int(value):
            require(value <= largest, field.name, value, f"must be an integer <= {largest}")
    at_least, above = at_least or {}, above or {}
    optional = {f.name for f in fields(config) if f.default is None}
    for name, bound in {**at_least, **above}.items():
        value = getattr(config, name)
        if value is None and name in optional:
            continue
        sort, right_kind = ("an integer", _is_int) if _is_int(bound) else ("a number", is_real)
        if name in at_least:
            require(right_kind(value) and value >= bound, name, value, f"must be {sort} >= {bound}")
        else:
            require(right_kind(value) and value > bound, name, value, f"must be {sort} > {bound}")
    for name, allowed in (_literals(config) | (choices or {})).items():
        value = getattr(config, name)
        require(value in allowed, name, value, f"must be one of {', '.join(map(str, allowed))}")


def _literals(config) -> dict[str, tuple]:
    """Option -> what its annotation allows, for a Literal or one that may be None as well."""
    found = {}
    for name, hint in get_type_hints(type(config)).items():
        parts = (hint,) if get_origin(hint) is Literal else get_args(hint)
        if all(get_origin(part) is Literal or part is type(None) for part in parts) and parts:
            found[name] = tuple(v for p in parts for v in (get_args(p) or (None,)))
    return found


def check_modules(option: str, value, *, regex: bool) -> None:
    """A list of module names or, where `regex`, one regular expression."""
    if isinstance(value, str) and regex:
        wrong = f"{option}={value!r:.200}: is no regular expression"
        with told_as(wrong, re.error, RecursionError, OverflowError):
            re.compile(value)
    names = [value] if isinstance(value, str) and regex else value
    ok = isinstance(names, list | tuple) and all(isinstance(n, str) and n for n in names)
    kinds = "names, or a regular expression" if regex else "names"
    require(ok, option, value, f"must be a list of module {kinds}, none of them empty")


def check_ranks(ranks) -> tuple[int, ...]:
    """Candidate ranks as a sorted tuple; raises InputError where they are not usable."""
    rule = "candidate ranks must be distinct integers >= 0, at least one of them above 0"
    require(isinstance(ranks, list | tuple) and len(ranks) > 0, "ranks", ranks, rule)
    require(all(_is_int(r) and r >= 0 for r in ranks), "ranks", ranks, rule)
    require(max(ranks) <= MAX_RANK, "ranks", ranks, f"must be at most {MAX_RANK}")
    require(len(set(ranks)) == len(ranks) and max(ranks) > 0, "ranks", ranks, rule)
    return tuple(sorted(ranks))
