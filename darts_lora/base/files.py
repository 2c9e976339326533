"""Files and folders that are there whole or not at all, one run alone in a folder, strict JSON.
Not here: what stands in them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from safetensors import SafetensorError

from darts_lora.base.errors import InputError, told_as

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None

LOCK_NAME = "run.lock"
# What a killed writer leaves beside a path, by names that nobody gives to a copy of their own;
LEFT = re.compile(r"(.+)\.darts_lora-(tmp|old)-(\d+)", re.DOTALL)
# and what safetensors and our own probe leave: these are files alone.
LEFT_FILE = re.compile(r"\.tmp[A-Za-z0-9]{6}|\.write-test-\d+")
_locked: dict[str, TextIO] = {}  # real path of a folder -> its lock, of this process


def is_main_process() -> bool:
    """Whether this process writes and prints, of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def write_whole(path: str | os.PathLike, write: Callable[[str], Any]) -> None:
    """Call `write(temporary path)` and rename the file or folder that it makes there to `path`,
    once it is on the disk; a folder replaces a folder, a file a file.

    Raises:
        InputError: it cannot be written.
    """
    path = os.fspath(path)
    with _written(path, write) as temporary:
        if os.path.isdir(temporary) and os.path.isdir(path):
            _replace_folder(temporary, path)
        else:
            os.replace(temporary, path)


def write_into(folder: str | os.PathLike, write: Callable[[str], Any], last: str) -> None:
    """Call `write(temporary folder)` and rename the files that it makes there into `folder`, once
    they are on the disk; the one named `last` behind all others.

    Raises:
        InputError: they cannot be written.
    """
    with _written(os.path.join(folder, last), write) as temporary:
        for name in sorted(os.listdir(temporary), key=lambda name: name == last):
            os.replace(os.path.join(temporary, name), os.path.join(folder, name))


@contextlib.contextmanager
def _written(path: str, write: Callable[[str], Any]) -> Iterator[str]:
    """Where what is to become `path` was written, and is on the disk; nothing stays there."""
    temporary, folder = f"{path}.darts_lora-tmp-{os.getpid()}", os.path.dirname(path) or "."
    check_lock(path)
    with told_as_unwritten(path):
        os.makedirs(folder, exist_ok=True)
        _tidy(folder, path)
        remove(temporary)  # of a killed writer with this number
        try:
            write(temporary)
            flush(temporary)
            yield temporary
            _flush_one(folder)
        finally:
            remove(temporary)


def told_as_unwritten(path: str) -> contextlib.AbstractContextManager[None]:
    """What the system refuses while `path` is written, as an InputError."""
    # ValueError: a null in a path
    return told_as(f"{path}: cannot be written", OSError, ValueError, SafetensorError)


def _replace_folder(new: str, path: str) -> None:
    """No folder can be renamed over another: the old one waits aside, where `locked` finds it if
    this process is killed."""
    old = f"{path}.darts_lora-old-{os.getpid()}"
    remove(old)
    os.replace(path, old)
    try:
        os.replace(new, path)
    finally:
        _settle(old)


def _settle(left: str) -> None:
    """Remove what a writer left beside a path; but an old folder comes back if no new one came."""
    path, kind, _ = LEFT.fullmatch(left).groups()
    if kind == "old" and not os.path.lexists(path):
        os.replace(left, path)
    else:
        remove(left)


def remove(path: str) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.remove(path)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file; raises InputError where it cannot be written."""

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)

    write_whole(path, write)


def check_writable(output_dir: str, option: str = "output_dir") -> str:
    """Create `output_dir` and check that files can be written there; returns it.

    Raises:
        InputError: it is a file, or nothing can be written.
    """
    probe = os.path.join(output_dir, f".write-test-{os.getpid()}")
    unwritten, advice = f"{option}={output_dir!r}: cannot be written", "; name another folder"
    with told_as(unwritten, OSError, ValueError, behind=advice):  # ValueError: a null in a path
        os.makedirs(output_dir, exist_ok=True)
        with open(probe, "w"):
            pass
        os.remove(probe)
    return output_dir


def write_json(path: str | os.PathLike, record: Any) -> None:
    """Write a JSON file; raises InputError where it cannot be written."""
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """What stands in a JSON file, by the standard alone: no NaN or Infinity, no key twice.

    Raises:
        InputError: it cannot be read, is not UTF-8, not JSON, nested too deep, or holds a number
            that is too large; the message does not name the file.
    """
    with told_as("cannot be read", OSError), open(path, "rb") as file:
        return parse_json(file.read())


def parse_json(content: bytes) -> Any:
    """The value that JSON in UTF-8 stands for; raises InputError as read_json does."""
    with told_as("cannot be read", ValueError, RecursionError):
        return json.loads(
            content.decode(),
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_refuse,
            object_pairs_hook=_distinct,
        )


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= 2**63:
        raise ValueError(f"{digits[:20]}... is too large a number")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.100} stands there twice")
        found[key] = value
    return found


@contextlib.contextmanager
def locked(folder: str | None) -> Iterator[None]:
    """Hold `folder` for one run: a second live one is refused. What killed ones left half written
    is removed, and a folder that they were replacing comes back. The kernel frees the lock of a
    process that dies. Blocks of one process may stand inside each other; of several processes of
    one run, the first holds the lock for all.

    Raises:
        InputError: another live run holds it, or no lock can be put there.
    """
    key = folder and os.path.realpath(folder)
    if folder is None or key in _locked or not is_main_process() or fcntl is None:
        yield
        return
    path = os.path.join(folder, LOCK_NAME)
    with _lock(path, folder) as file:
        _locked[key] = file
        try:
            for place in (folder, os.path.join(folder, "checkpoints")):
                _tidy(place)
            yield
        finally:
            del _locked[key]
            if _is_at(path, file):  # else it is another run's
                with contextlib.suppress(OSError):
                    os.remove(path)


def check_lock(path: str) -> None:
    """Raises InputError where `path` is in a folder that this process has locked, and the lock is
    gone: somebody removed the folder, and another run may have begun there."""
    path = os.path.realpath(path)
    for folder, file in _locked.items():
        inside = path.startswith(os.path.join(folder, ""))
        if inside and not _is_at(os.path.join(folder, LOCK_NAME), file):
            raise InputError(
                f"output_dir={folder!r}: its {LOCK_NAME} was removed, and another run may be there "
                "now: stopped, nothing more is written"
            )


def _tidy(folder: str, written: str | None = None) -> None:
    """Remove what killed writers left there, or put back what they were replacing; where the folder
    is not locked, only what dead ones left of the path that is `written` now."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    for path in (os.path.join(folder, name) for name in names):
        found = LEFT.fullmatch(path)
        if written is not None:
            same = found and os.path.basename(found[1]) == os.path.basename(written)
            if same and not _lives(int(found[3])):
                _settle(path)
        elif found:
            _settle(path)
        elif LEFT_FILE.fullmatch(os.path.basename(path)) and os.path.isfile(path):
            remove(path)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _lock(path: str, folder: str) -> TextIO:
    """The file at `path`, open, locked and with our name in it."""
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closing it ends the lock
    except OSError as error:  # of another user, or no file
        reason = f"{LOCK_NAME}: {error.strerror}"
        raise InputError(f"output_dir={folder!r}: cannot be locked ({reason})") from error
    try:
        # not flock: data workers would inherit it, and hold it for a while when this process dies
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        with file:
            raise InputError(
                f"output_dir={folder!r}: a live run uses it ({file.read().strip()}); name another "
                "folder, or end that run first"
            ) from None
    except OSError as error:  # some network file systems
        warnings.warn(f"{folder}: cannot be locked ({error.strerror})", stacklevel=4)
    if not _is_at(path, file):  # the run before removed it when it ended, just now
        file.close()
        return _lock(path, folder)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as error:  # no byte is free
        reason = f"{LOCK_NAME}: {error.strerror}"
        with contextlib.suppress(OSError):  # it tries to write once more
            file.close()
        raise InputError(f"output_dir={folder!r}: cannot be locked ({reason})") from error
    return file


def _is_at(path: str, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def flush(path: str) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            _flush_one(os.path.join(folder, name))
    _flush_one(path)


def _flush_one(path: str) -> None:
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
