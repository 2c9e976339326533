"""What Arrow takes for granted of files: rows not nested without end, text in UTF-8; checked here.
Not here: how files are loaded (sources.py), what a row means (rows.py)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from darts_lora.base.errors import InputError

MAX_NESTING = 100  # lists and objects of a row; Arrow's reader ends the process near 10,000
BLOCK = 1 << 24  # bytes
_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)  # or one without an end
_OTHERS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1


def check_nesting(files: Iterable[str]) -> None:
    """Look through JSON files on this machine for rows that are nested too deep.

    Raises:
        InputError: one has such a row; the line is named.
    """
    for file in files:
        if file.lower().endswith((".json", ".jsonl")) and "://" not in file:
            _check_file(file)


def _check_file(file: str) -> None:
    before = 0  # lines of the blocks before
    with open(file, "rb") as content:
        for block in _whole_lines(content):
            codes = np.frombuffer(block, np.uint8)
            ends = np.flatnonzero(codes == ord("\n")) + 1
            starts = np.concatenate([[0], ends[ends < len(codes)]])
            starts = np.append(starts, len(codes))
            opened = np.flatnonzero((codes | 0x20) == ord("{"))  # "[" is the same without that bit
            many = np.diff(np.searchsorted(opened, starts)) > MAX_NESTING
            for line in np.flatnonzero(many):  # few: only in these are texts left out
                if _depth(block[starts[line] : starts[line + 1]]) > MAX_NESTING:
                    raise InputError(
                        f"data_files: {file!r}, line {before + line + 1}: lists and objects are "
                        f"nested more than {MAX_NESTING} deep"
                    )
            before += len(ends)


def _whole_lines(content) -> Iterator[bytes]:
    """The file in blocks that end with a line."""
    while block := content.read(BLOCK):
        yield block + content.readline()


def _depth(content: bytes) -> int:
    """How deep lists and objects of JSON are nested at most, texts left out."""
    brackets = _TEXT.sub(b"", content).translate(None, _OTHERS)
    steps = _STEPS[np.frombuffer(brackets, np.uint8)]
    return int(steps.cumsum(dtype=np.int64).max(initial=0))


def check_text(table: pa.Table, where: str) -> None:
    """Look through all texts of a table, images left out.

    Args:
        where: its name, for the message.

    Raises:
        InputError: a text that is not UTF-8; row and column are named.
    """
    for name in table.column_names:
        start = 0
        for chunk in table[name].chunks:
            try:
                chunk.validate(full=True)
            except pa.ArrowInvalid as error:
                for row, value in enumerate(chunk, start):  # it may be behind a slice's end
                    if not _is_text(value):
                        raise InputError(
                            f"{where}, row {row}, column {name!r}: is not text in UTF-8"
                        ) from error
            start += len(chunk)


def _is_text(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True
