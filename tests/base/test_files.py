"""Files and folders are there whole or not at all; one live run in a folder.
Not here: what the writers of this package put into them."""

import fcntl
import itertools
import json
import os
import resource
import shutil
import signal
import time

import pytest

from darts_lora import InputError
from darts_lora.base.files import (
    check_lock,
    check_writable,
    locked,
    parse_json,
    read_json,
    write_into,
    write_json,
    write_text,
    write_whole,
)


def test_what_is_written_is_read_back_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "record.json"
    write_json(path, {"loss": 0.5, "steps": [1, 2]})
    assert json.loads(path.read_text()) == {"loss": 0.5, "steps": [1, 2]}
    write_text(path, "über")
    assert path.read_bytes() == "über".encode()
    assert os.listdir(path.parent) == ["record.json"]


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_writer_that_fails_half_way_leaves_the_old_file(tmp_path, problem):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        with open(temporary, "w") as file:
            file.write("half of the n")
        assert path.read_text() == "old"
        raise problem

    expected = InputError if isinstance(problem, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as error:
        write_whole(path, write)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    if expected is InputError:
        assert str(error.value) == f"{path}: cannot be written (No space left on device)"


def test_values_that_json_does_not_know_leave_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, 1)
    for record in ({"loss": float("nan")}, {"path": tmp_path}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, record)
    assert path.read_text() == "1\n" and os.listdir(tmp_path) == ["record.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "below", tmp_path):  # below a file; a folder
        with pytest.raises(InputError, match=r"cannot be written \(.+\)") as error:
            write_text(path, "text")
        assert str(error.value).startswith(f"{path}: ")
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_replaces_a_folder_as_a_whole(tmp_path):
    def writer(name):
        def write(temporary):
            os.mkdir(temporary)
            write_text(os.path.join(temporary, name), name)

        return write

    for name in ("a", "b"):
        write_whole(tmp_path / "folder", writer(name))
        assert os.listdir(tmp_path / "folder") == [name]
    assert os.listdir(tmp_path) == ["folder"]


def test_files_come_into_a_folder_together_one_of_them_last(monkeypatch, tmp_path):
    (tmp_path / "notes").write_text("mine")
    names, replace, order = ("weights", "config", "about"), os.replace, []

    def write(temporary):
        os.mkdir(temporary)
        for name in names:
            write_text(os.path.join(temporary, name), name)
        monkeypatch.setattr(os, "replace", lambda *p: order.append(p[1]) or replace(*p))

    write_into(tmp_path, write, last="config")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        **{name: name for name in names},
        "notes": "mine",
    }
    assert sorted(order) == sorted(str(tmp_path / name) for name in names)
    assert order[-1] == str(tmp_path / "config")


def test_no_file_comes_into_a_folder_where_one_cannot_be_written(tmp_path):
    def write(temporary):
        os.mkdir(temporary)
        write_text(os.path.join(temporary, "config"), "half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"weights: cannot be written \(No space left"):
        write_into(tmp_path, write, last="weights")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("begun", "done", "left"), [(1, 0, "old"), (2, 1, "old"), (2, 2, "new")])
def test_a_writer_killed_while_it_replaces_a_folder_leaves_one_of_both(tmp_path, begun, done, left):
    def writer(content):
        def write(temporary):
            os.mkdir(temporary)
            write_text(os.path.join(temporary, "state"), content)

        return write

    place = tmp_path / "checkpoints"
    write_whole(place / "step-1", writer("old"))
    child = os.fork()
    if child == 0:
        rename, calls = os.replace, itertools.count()  # of which 0 is write_text's own

        def rename_or_die(*paths):
            call = next(calls)
            if call <= done:
                rename(*paths)
            if call == begun:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = rename_or_die
        try:
            write_whole(place / "step-1", writer("new"))
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with locked(str(tmp_path)):
        assert os.listdir(place) == ["step-1"]
    assert (place / "step-1" / "state").read_text() == left


def test_a_writer_removes_what_a_dead_one_left_of_the_same_file_alone(tmp_path):
    """Derive, evaluate and report hold no lock."""
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    names = [f"record.darts_lora-tmp-{dead}", f"other.darts_lora-tmp-{dead}"]
    names.append(f"record.darts_lora-tmp-{os.getppid()}")
    for name in names:
        (tmp_path / name).write_text("half")
    write_text(tmp_path / "record", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], "record"])


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(InputError) as error, locked(str(tmp_path)):
        pass
    assert str(error.value) == (
        f"output_dir='{tmp_path}': cannot be locked (run.lock: Is a directory)"
    )


# what users keep beside a run, by names as these
MINE = ("notes.tmp-mine", "genotype.json.old-1", "config.yaml.tmp-2", ".tmp", "a.tmpAbC123")


def hold(folder, seconds, told):
    """A run in a process of its own, with a data worker that outlives it for a moment."""
    with locked(folder):
        if os.fork() > 0:
            os.write(told, b"held")
        time.sleep(seconds)
    os._exit(0)


def test_a_folder_is_held_by_one_live_run_and_free_when_it_was_killed(tmp_path):
    heard, told = os.pipe()
    other = os.fork()
    if other == 0:
        hold(str(tmp_path), 5, told)
    assert os.read(heard, 4) == b"held"
    for _ in range(2):  # the first refusal must not end the other's lock, nor its name in the file
        with (
            pytest.raises(InputError, match=rf"a live run uses it \(process {other} on \w"),
            locked(str(tmp_path)),
        ):
            pass
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    (tmp_path / "checkpoints").mkdir()
    half = ("genotype.json.darts_lora-tmp-12", "checkpoints/step-0000003.darts_lora-tmp-12")
    for left in (*half, ".tmpAbC123", ".write-test-7", *MINE):
        (tmp_path / left).write_text("half")
    with locked(str(tmp_path)), locked(str(tmp_path)):  # one run may hold it twice
        assert sorted(os.listdir(tmp_path)) == sorted(["checkpoints", "run.lock", *MINE])
        assert os.listdir(tmp_path / "checkpoints") == []
        assert f"process {os.getpid()} on" in (tmp_path / "run.lock").read_text()
    assert sorted(os.listdir(tmp_path)) == sorted(["checkpoints", *MINE])


def test_a_run_whose_lock_was_removed_writes_no_more_and_leaves_the_other_one_its_own(tmp_path):
    """Somebody removed the folder of a live run, and another began there."""
    run, told = tmp_path / "run", "its run.lock was removed, and another run may be there now"
    with locked(str(run)):
        write_text(run / "below" / "record", "mine")
        shutil.rmtree(run)
        run.mkdir()
        (run / "run.lock").write_text("another's")
        for write in (write_text, check_lock):
            with pytest.raises(InputError, match=told):
                write(*[run / "below" / "record", "mine"][: 2 if write is write_text else 1])
        write_text(tmp_path / "elsewhere", "mine")
    assert os.listdir(run) == ["run.lock"] and (run / "run.lock").read_text() == "another's"


def test_a_lock_that_no_byte_is_free_for_is_told(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
    try:
        with (
            pytest.raises(InputError, match=r"cannot be locked \(run\.lock: File too large"),
            locked(str(tmp_path)),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_cannot_be_removed_either_is_told_as_what_cannot_be_written(monkeypatch, tmp_path):
    """As on a file system that is mounted read-only, where no file can be removed that is none."""

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "remove", refuse)
    with pytest.raises(InputError, match=r"cannot be written \(Read-only file system\)"):
        write_text(tmp_path / "record", "text")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 30, "9" * 5000, "-" + "9" * 20])
def test_numbers_that_are_too_large_are_no_json_of_ours(tmp_path, number):
    (tmp_path / "record.json").write_text(f'{{"a": [{number}]}}')
    with pytest.raises(InputError, match=r"cannot be read \(-?\d.* is too large a number\)"):
        read_json(tmp_path / "record.json")
    assert parse_json(b"[9223372036854775807, 1e308]") == [2**63 - 1, 1e308]


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(monkeypatch, tmp_path):
    path, lockf, taken = tmp_path / "run.lock", fcntl.lockf, []

    def lockf_late(file, how):
        if not taken:
            path.unlink()  # the run before ended between our opening and our locking
        taken.append(os.fstat(file.fileno()).st_ino)
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", lockf_late)
    with locked(str(tmp_path)):
        assert len(taken) == 2 and path.stat().st_ino == taken[1]


def test_only_the_first_process_of_a_run_locks(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    with locked(str(tmp_path)), locked(None):
        assert os.listdir(tmp_path) == []


def test_output_dir_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match=r"output_dir='.*file/run': cannot be written"):
        check_writable(str(file / "run"))
    check_writable(str(tmp_path / "new"))
    assert os.listdir(tmp_path / "new") == []
