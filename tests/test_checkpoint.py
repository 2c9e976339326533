"""Checkpoints: the newest two are kept, read back exactly, and never run code.
Not here: what a search puts into one and how it goes on (test_search.py)."""

import os
import pickle

import pytest
import torch

from darts_lora import InputError
from darts_lora.checkpoint import (
    checkpoints,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)

CPU = torch.device("cpu")


def state(step):
    return {"step": step, "weights": torch.arange(3.0) * step, "random": [random_state(CPU)]}


def names(folder):
    return [os.path.basename(path) for path in checkpoints(str(folder))]


def test_the_newest_two_are_kept_and_the_newest_is_read(tmp_path):
    assert checkpoints(None) == names(tmp_path) == []
    for step in (5, 90, 100):
        save_checkpoint(str(tmp_path), state(step))
    assert names(tmp_path) == ["step-0000090.pt", "step-0000100.pt"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == names(tmp_path)
    loaded = load_checkpoint(str(tmp_path), num_processes=1)
    assert loaded["step"] == 100
    assert torch.equal(loaded["weights"], torch.tensor([0.0, 100.0, 200.0]))


def test_a_folder_with_pattern_characters_in_its_name(tmp_path):
    folder = tmp_path / "lr[1e-3]*"
    save_checkpoint(str(folder), state(1))
    assert names(folder) == ["step-0000001.pt"]


def test_a_writer_that_fails_leaves_the_checkpoints_before(monkeypatch, tmp_path):
    for step in (1, 2):
        save_checkpoint(str(tmp_path), state(step))

    def fail(content, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(InputError, match=r"step-0000003\.pt: cannot be written \(No space left"):
        save_checkpoint(str(tmp_path), state(3))
    assert len(os.listdir(tmp_path / "checkpoints")) == 2
    assert load_checkpoint(str(tmp_path), 1)["step"] == 2


@pytest.mark.parametrize("kept", [0, 10, 1000])
def test_a_truncated_file_is_named_and_what_to_do(tmp_path, kept):
    for step in (1, 2):
        save_checkpoint(str(tmp_path), state(step))
    newest = checkpoints(str(tmp_path))[-1]
    with open(newest, "r+b") as file:
        file.truncate(kept)
    with pytest.raises(InputError, match=r"step-0000002\.pt cannot be read .*remove it to go on"):
        load_checkpoint(str(tmp_path), 1)
    os.remove(newest)
    assert load_checkpoint(str(tmp_path), 1)["step"] == 1


class Payload:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def dump(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [torch.save, dump])
def test_code_in_a_file_is_not_run(monkeypatch, tmp_path, write):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    write({"step": 1, "random": Payload()}, tmp_path / "checkpoints" / "step-0000001.pt")
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(str(tmp_path), 1)
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_none_there_or_of_another_number_of_processes(tmp_path):
    with pytest.raises(InputError, match=r"resume: there is no checkpoint in .*start without it"):
        load_checkpoint(str(tmp_path), 1)
    save_checkpoint(str(tmp_path), state(1))
    with pytest.raises(InputError, match="was written by 1 processes, this run has 2"):
        load_checkpoint(str(tmp_path), 2)


def test_the_random_state_comes_back_through_a_file(tmp_path):
    save_checkpoint(str(tmp_path), state(1))
    drawn = torch.rand(4)
    restore_random_state(load_checkpoint(str(tmp_path), 1)["random"][0])
    assert torch.equal(torch.rand(4), drawn)
