"""Checkpoints: the newest two are kept, read back exactly, checked, and never run code.
Not here: what a search puts into one (test_resume.py) and how it goes on (test_search.py)."""

import json
import os
import pickle
import resource
import warnings

import pytest
import torch

from darts_lora import InputError
from darts_lora.run import checkpoint as checkpoint_module
from darts_lora.run.checkpoint import checkpoints, load_checkpoint, save_checkpoint, steps_done

OPTIONS = {"search_steps": 100, "ranks": [0, 4], "budget_rank": None}


def state(step):
    return {"step": step, "weights": torch.arange(3.0) * step}


def save(folder, *steps):
    for step in steps:
        save_checkpoint(str(folder), state(step), OPTIONS)


def load(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_checkpoint(str(folder))


def names(folder):
    return [os.path.basename(path) for path in checkpoints(str(folder))]


def test_the_newest_two_are_kept_and_the_newest_is_read(tmp_path):
    assert checkpoints(None) == names(tmp_path) == []
    assert steps_done(str(tmp_path)) is None
    save(tmp_path, 5, 90, 100)
    assert names(tmp_path) == ["step-0000090", "step-0000100"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == names(tmp_path)
    loaded, options = load(tmp_path)
    assert loaded["step"] == 100 and options == OPTIONS
    assert torch.equal(loaded["weights"], torch.tensor([0.0, 100.0, 200.0]))
    assert steps_done(str(tmp_path)) == (100, OPTIONS)


def test_a_folder_with_pattern_characters_in_its_name(tmp_path):
    save(tmp_path / "lr[1e-3]*", 1)
    assert names(tmp_path / "lr[1e-3]*") == ["step-0000001"]


def test_steps_are_numbers_and_not_text(tmp_path):
    save(tmp_path, 9_999_999, 10_000_000)
    assert names(tmp_path) == ["step-9999999", "step-10000000"]
    assert load(tmp_path)[0]["step"] == 10_000_000


def test_one_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "step-0000002" / "state.pt").write_bytes(b"damaged")
    save(tmp_path, 2)
    assert load(tmp_path)[0]["step"] == 2 and len(names(tmp_path)) == 2


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path):
    save(tmp_path, 1, 2)
    large = {"step": 3, "weights": torch.zeros(100_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # files can't grow beyond this
    try:
        with pytest.raises(InputError, match=r"step-0000003: cannot be written \(is the disk full"):
            save_checkpoint(str(tmp_path), large, OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-0000001", "step-0000002"]
    assert load(tmp_path)[0]["step"] == 2


def test_what_is_no_fault_of_the_disk_is_not_told_as_one(monkeypatch, tmp_path):
    def fail(state, path):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        save(tmp_path, 1)
    assert os.listdir(tmp_path / "checkpoints") == []


def test_no_space_for_the_record_leaves_the_checkpoints_before(monkeypatch, tmp_path):
    save(tmp_path, 1, 2)

    def fail(path, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_json", fail)
    with pytest.raises(InputError, match=r"step-0000003: cannot be written \(No space left"):
        save(tmp_path, 3)
    assert len(os.listdir(tmp_path / "checkpoints")) == 2 and load(tmp_path)[0]["step"] == 2


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def rewrite(path, **changed):
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


DAMAGES = {
    "half": lambda folder: os.truncate(folder / "state.pt", 700),
    "empty": lambda folder: os.truncate(folder / "state.pt", 0),
    "a flipped bit": lambda folder: flip(folder / "state.pt", 600),
    "no state": lambda folder: (folder / "state.pt").unlink(),
    "no record": lambda folder: (folder / "checkpoint.json").unlink(),
    "half a record": lambda folder: os.truncate(folder / "checkpoint.json", 30),
    "a record without end": lambda folder: (folder / "checkpoint.json").write_text("[" * 100_000),
    "of another release": lambda folder: rewrite(folder / "checkpoint.json", format=0),
    "another record": lambda folder: (folder / "checkpoint.json").write_text("[1]"),
    "another option": lambda folder: rewrite(folder / "checkpoint.json", options={"seed": 1}),
}


def test_a_record_that_does_not_say_how_long_its_search_is_counts_as_damaged(tmp_path):
    save(tmp_path, 1)
    save_checkpoint(str(tmp_path), state(2), {"ranks": [0, 4]})
    assert steps_done(str(tmp_path)) == (1, OPTIONS)
    with pytest.warns(UserWarning, match=r"step-0000002 cannot be read .*going on from"):
        assert load_checkpoint(str(tmp_path))[0]["step"] == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_one_is_used_with_one_warning(tmp_path, damage):
    save(tmp_path, 1, 2)
    DAMAGES[damage](tmp_path / "checkpoints" / "step-0000002")
    with pytest.warns(UserWarning, match=r"step-0000002 .*going on from .*step-0000001$") as told:
        assert load_checkpoint(str(tmp_path))[0]["step"] == 1
    assert len(told) == 1


def test_what_is_not_of_a_search_is_left_alone_and_a_link_is_followed_but_not_removed(tmp_path):
    place, other = tmp_path / "checkpoints", tmp_path / "another disk"
    save(tmp_path, 1, 2)
    os.rename(place / "step-0000001", other)
    (place / "step-0000001").symlink_to(other)
    (place / "step-0000002" / "notes.txt").write_text("mine")
    (place / "step-0000009").write_text("a file")
    (place / "step-0000002.bak").mkdir()
    assert names(tmp_path) == ["step-0000001", "step-0000002"]
    save(tmp_path, 3, 4)
    assert load(tmp_path)[0]["step"] == 4
    assert sorted(os.listdir(other)) == ["checkpoint.json", "state.pt"]
    assert not (place / "step-0000001").is_symlink()
    assert os.listdir(place / "step-0000002") == ["notes.txt"]
    assert {"step-0000009", "step-0000002.bak"} <= {*os.listdir(place)}


def test_none_there_or_none_whole(tmp_path):
    with pytest.raises(InputError, match=r"resume: there is no checkpoint in .*start without it"):
        load(tmp_path)
    save(tmp_path, 1, 2)
    for path in (tmp_path / "checkpoints").iterdir():
        flip(path / "state.pt", 600)
    with pytest.raises(
        InputError, match=r"0002 is damaged .*0001 is damaged .*no checkpoint is left"
    ):
        load(tmp_path)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def dump(content, path):
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol=2)


@pytest.mark.parametrize("write", [torch.save, dump])
def test_code_in_a_file_is_not_run(monkeypatch, tmp_path, write):
    """Although its checksum is right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "save", write)
    save_checkpoint(str(tmp_path), {"step": 1, "random": Payload()}, OPTIONS)
    with pytest.raises(InputError, match=r"step-0000001 cannot be read"):
        load(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoints"]
