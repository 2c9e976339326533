"""Files are there whole or not at all.
Not here: what the writers of this package put into them."""

import json
import os

import pytest

from darts_lora import InputError
from darts_lora.files import write_json, write_text, write_whole


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
