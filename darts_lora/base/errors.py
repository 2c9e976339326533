"""The error class for bad input: names the option, the value and what would be right.
Not here: checks themselves (each room checks its own input), nor errors of PyTorch or the model."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

TOO_LONG = 2000  # characters of an error line


class InputError(ValueError):
    """Bad input from the user. Recipes print its message alone and exit with status 2."""


class DivergedError(InputError):
    """A training whose loss or alpha is infinite or NaN, most often of too high a learning rate."""


class RowsError(InputError):
    """Several rows that cannot be used: a head, and a line for each of the first ones."""

    def __init__(self, head: str, rows: list[str]):
        super().__init__("\n  ".join([head, *rows]))
        self.lines = [head, *(f"  {row}" for row in rows)]


def one_line(error: BaseException, limit: int = 300) -> str:
    """What another library's error says, as a part of one line: at most `limit` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


@contextmanager
def told_as(before: str, *kinds: type[Exception], behind: str = "") -> Iterator[None]:
    """What one of `kinds` says inside, as an InputError: "before (what it says)behind". InputErrors
    stay as they are, unless they are named among them."""
    try:
        yield
    except kinds as error:
        if isinstance(error, InputError) and InputError not in kinds:
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{before} ({reason}){behind}") from error


def printable(text: str, keep: str = "") -> str:
    """`text` as a terminal can show it: control characters, line ends among them, and those that
    turn the direction of writing come as escapes, but for those of `keep`."""
    return "".join(c if c in keep or _shows(c) else _escape(c) for c in text)


def error_line(error: BaseException) -> str:
    """One printable line that says what is wrong, whatever a file put into the message; of a
    RowsError its lines."""
    lines = error.lines if isinstance(error, RowsError) else [str(error)]
    return "error: " + "\n".join(map(_bounded, lines))


def _bounded(text: str) -> str:
    if len(text) > TOO_LONG:  # what to do about it stands at the end
        text = f"{text[: TOO_LONG * 3 // 4]} [...] {text[-TOO_LONG // 4 :]}"
    return printable(text)


def _shows(character: str) -> bool:
    return unicodedata.category(character)[0] != "C" and character not in "\u2028\u2029"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
