"""A finetune that was cut off and goes on: bit for bit, from a whole checkpoint, by its options.
Not here: kills at random moments of whole recipes (recipes/test_benchmarks.py)."""

import json
import os
import pickle
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_finetune import TRAINING as SHORT
from test_finetune import faulty

from darts_lora import InputError
from darts_lora import finetune as finetune_module
from darts_lora.finetune import FinetuneConfig, finetune
from darts_lora.run.beginning import first_rows
from darts_lora.run.checkpoint import FINETUNE, checkpoints, seal

TRAINING = replace(SHORT, max_steps=6, save_steps=2, logging_steps=4)


def stop():
    raise KeyboardInterrupt


def adapter(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(genotype, base_config, data, tmp_path_factory):
    """A finetune in one go: its folder and its record."""
    folder = tmp_path_factory.mktemp("whole")
    config = FinetuneConfig(genotype, output_dir=str(folder))
    return folder, finetune(config, base_config, data, TRAINING)[1]


@pytest.fixture(scope="module")
def cut(genotype, base_config, data, tmp_path_factory):
    """One that was cut off in its sixth step, behind checkpoints at the second and the fourth."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        faulty(patch, stop, step=6)
        finetune(FinetuneConfig(genotype, output_dir=str(folder)), base_config, data, TRAINING)
    return folder


@pytest.fixture
def config(genotype, cut, tmp_path):
    """To go on with a copy of it."""
    shutil.copytree(cut, tmp_path, dirs_exist_ok=True)
    return FinetuneConfig(genotype, output_dir=str(tmp_path), resume=True)


def test_it_ends_bit_for_bit_as_one_in_one_go(config, whole, base_config, data, tmp_path):
    folder, record = whole
    found = [os.path.basename(path) for path in checkpoints(str(tmp_path), FINETUNE)]
    assert found == ["checkpoint-2", "checkpoint-4"]
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        step = finetune_module.FinetuneTrainer.training_step
        patch.setattr(
            finetune_module.FinetuneTrainer, "training_step",
            lambda self, *args: steps.append(self.state.global_step) or step(self, *args),
        )  # fmt: skip
        _, resumed = finetune(config, base_config, data, TRAINING)
    assert steps == [4, 5]
    assert adapter(tmp_path) == adapter(folder)
    kept = {"losses", "loss", "course", "trainable_parameters", "rows"}
    assert {name: resumed[name] for name in kept} == {name: record[name] for name in kept}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}


def test_one_that_has_ended_is_not_trained_again(genotype, whole, base_config, data, monkeypatch):
    folder, record = whole
    monkeypatch.setattr(finetune_module.FinetuneTrainer, "train", lambda *a, **k: pytest.fail())
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    config = FinetuneConfig(genotype, output_dir=str(folder), resume=True)
    model, same = finetune(config, base_config, data, TRAINING)
    assert same == json.loads(json.dumps(record))
    state = load_file(folder / "adapter_model.safetensors")
    for name, value in model.state_dict().items():
        if "lora_" in name:
            assert torch.equal(state[name.replace(".default", "")], value)
    with pytest.raises(InputError, match=r"^seed=3: the finetune to resume has seed=0; go on with"):
        finetune(replace(config, seed=3), base_config, data, TRAINING)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"learning_rate": 0.5}, "learning_rate=0.5: the finetune to resume has learning_rate=0.0"),
        ({"max_steps": 9}, "max_steps=9: the finetune to resume has max_steps=6"),
        ({"seed": 2}, "seed=2: the finetune to resume has seed=0"),
        ({"max_train_samples": 30}, "max_train_samples=30: the finetune to resume has max_train"),
        ({"rank": 2}, "rank=2: the finetune to resume has rank=None"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16': the finetune to resume has dtype='auto'"),
    ],
)
def test_other_options_are_refused_and_nothing_is_touched(
    config, base_config, data, changed, text, tmp_path
):
    def with_changes(options):
        return replace(options, **{k: v for k, v in changed.items() if hasattr(options, k)})

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InputError, match=f"^{text}"):
        finetune(*map(with_changes, (config, base_config, data, TRAINING)))
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert {p: t for p, t in after.items() if p.is_file()} == {
        p: t for p, t in before.items() if p.is_file()
    }


def test_options_that_change_nothing_may_differ(config, whole, base_config, data, tmp_path):
    training = replace(TRAINING, save_steps=1, logging_steps=1, max_runtime=9.0)
    _, record = finetune(config, base_config, data, training)
    assert adapter(tmp_path) == adapter(whole[0])
    assert [step for step, _ in record["losses"]] == [2, 4, 5, 6]


def test_where_a_finetune_may_start(config, base_config, data, tmp_path):
    fresh = replace(config, resume=False)
    with pytest.raises(InputError, match=r"an unfinished finetune is there \(step 4 of 6\); go on"):
        finetune(fresh, base_config, data, TRAINING)
    nowhere = replace(config, output_dir=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"^resume: there is no checkpoint in .*nowhere'; start w"):
        finetune(nowhere, base_config, data, TRAINING)


def test_what_was_not_written_to_its_end_is_no_checkpoint(
    config, whole, base_config, data, tmp_path
):
    (tmp_path / "checkpoints" / "checkpoint-4" / "checkpoint.json").unlink()
    (tmp_path / "checkpoints" / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        finetune(config, base_config, data, TRAINING)
    assert adapter(tmp_path) == adapter(whole[0])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "rng_state.pth"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    config, whole, base_config, data, tmp_path, name
):
    path = tmp_path / "checkpoints" / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"checkpoint-4 is damaged .*: going on from .*-2"):
        finetune(config, base_config, data, TRAINING)
    assert adapter(tmp_path) == adapter(whole[0])


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_is_not_run(config, base_config, data, tmp_path, name):
    folder, trap = tmp_path / "checkpoints" / "checkpoint-4", tmp_path / "trap"
    record = json.loads((folder / "checkpoint.json").read_text())
    torch.save(Code(str(trap)), folder / name, pickle_module=pickle)
    seal(str(folder), {part: record[part] for part in ("step", "options", "seconds")})
    with pytest.raises(InputError, match=r"^resume: .*checkpoint-4 cannot be read \("):
        finetune(config, base_config, data, TRAINING)
    assert not trap.exists()


def test_files_of_the_user_among_the_checkpoints_stay(config, base_config, data, tmp_path):
    notes = tmp_path / "checkpoints" / "checkpoint-2" / "notes.txt"
    notes.write_text("mine")
    finetune(config, base_config, data, TRAINING)
    assert [path for path in tmp_path.joinpath("checkpoints").rglob("*") if path.is_file()] == [
        notes
    ]
    assert notes.read_text() == "mine"


def test_the_rows_that_the_search_left_come_first(base_config, data, tmp_path):
    config = FinetuneConfig(str(tmp_path / "genotype.json"), init="inherit")
    rows = {"row_index": [10, 11, 12, 13]}
    assert first_rows(config, rows, base_config, data) is None, "it does not say"
    (tmp_path / "split.json").write_text(json.dumps({"taken": [11, 13, 99]}))
    assert first_rows(config, rows, base_config, data) == [0, 2]
    assert first_rows(replace(config, init="scratch"), rows, base_config, data) is None
    (tmp_path / "config.yaml").write_text("dataset: another\n")
    assert first_rows(config, rows, base_config, data) is None, "its numbers are of other rows"
    (tmp_path / "config.yaml").unlink()
    for content in ("[]", "{", '{"taken": 3}'):
        (tmp_path / "split.json").write_text(content)
        with pytest.raises(InputError, match=r"split\.json: is not what a search leaves"):
            first_rows(config, rows, base_config, data)
