"""Whether a run may go on, or write where another one was: what is compared, and the state that it
goes on from. Not here: files (test_checkpoint.py), a search that is cut off (test_search.py)."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_search import make

from darts_lora import InputError
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.finetune import FinetuneConfig, finetune
from darts_lora.run.checkpoint import load_checkpoint, save_checkpoint
from darts_lora.run.course import FREE, placeless, task_options
from darts_lora.run.resume import (
    check_alpha_is_one,
    check_start,
    random_state,
    restore_random_state,
)
from darts_lora.run.together import check_not_anothers
from small_models import residual


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A search of 12 steps with one checkpoint behind each sixth."""
    folder = tmp_path_factory.mktemp("run")
    make(folder, save_steps=6).run()
    return folder


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"seed": 1}, "seed=1: the search to resume has seed=0;"),
        (
            {"ranks": (0, 2, 4)},
            r"ranks=\[0, 2, 4\]: the search to resume has ranks=\[0, 1, 2, 4\];",
        ),
        ({"batch_size": 4}, "batch_size=4: the search to resume has batch_size=16;"),
        ({"learning_rate": 0.02}, "learning_rate=0.02: the search to resume has .*=0.01;"),
        ({"max_steps": 20}, "max_steps=20: the search to resume has max_steps=12;"),
        ({"budget_rank": None}, "budget_rank=None: the search to resume has budget_rank=2;"),
        ({"arch_every": 3}, "arch_every=3: the search to resume has arch_every=1;"),
        ({"model": residual(seed=1)}, "base_weights='.*': the search to resume has base_weig"),
        ({"dropout": 0.1}, "dropout=0.1: the search to resume has dropout=0.0;"),
        (
            {"course": {"split": "b"}},
            "split='b': the search to resume has split=None; go on with that, or start anew in "
            "another output_dir$",
        ),
    ],
)
def test_other_options_that_change_the_course_are_refused_by_name(folder, changed, text):
    search = make(folder, **changed)
    before = search.supernet.alpha.detach().clone()
    with pytest.raises(InputError, match=f"^{text}"):
        search.run(resume=True)
    assert torch.equal(search.supernet.alpha, before) and search.step == 0


def test_options_that_change_nothing_may_differ(folder):
    changed = {"logging_steps": 3, "save_steps": 7, "num_workers": 1, "max_runtime": 5.0}
    assert set(changed) == set(FREE)
    assert make(folder, **changed).run(resume=True) == make().run()


def test_another_number_of_processes_is_refused(folder):
    search = make(folder)
    search.course["num_processes"] = 2
    with pytest.raises(InputError, match=r"num_processes=2: the search to resume has .*=1;"):
        search.resume()


def test_what_accelerates_variables_decide_is_compared(folder):
    search = make(folder)
    assert search.course["accelerate_dynamo_backend"] == "NO"
    search.course["accelerate_dynamo_backend"] = "INDUCTOR"
    with pytest.raises(InputError, match=r"accelerate_dynamo_backend='INDUCTOR': the search to"):
        search.resume()


@pytest.mark.parametrize("lost", ["architect", "optimizer", "streams", "random"])
def test_a_state_of_another_release_is_told_in_a_line(folder, tmp_path, lost):
    state, options = load_checkpoint(str(folder))
    without = {name: value for name, value in state.items() if name != lost}
    for changed in (without, {**state, lost: [torch.ones(1)]}):
        save_checkpoint(str(tmp_path), changed, options)
        with pytest.raises(InputError, match=r"^resume: the checkpoint's state is of another rele"):
            make(tmp_path).resume()


def test_where_a_search_may_start(tmp_path):
    folder = str(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_start(None, resume=False)
        check_start(folder, resume=False)
        with pytest.raises(InputError, match=r"resume: there is no checkpoint in .*start without"):
            check_start(folder, resume=True)
        for step in (4, 10):
            save_checkpoint(folder, {"step": step}, {"search_steps": 10})
        check_start(folder, resume=True)
        with pytest.raises(InputError, match=r"\(step 10 of 10\)"):  # killed before its result
            check_start(folder, resume=False)
        (tmp_path / "genotype.json").touch()
        check_start(folder, resume=False)  # that one is finished
        (tmp_path / "checkpoints" / "step-0000010" / "checkpoint.json").write_text("")
        with pytest.raises(
            InputError, match=r"output_dir=.* \(step 4 of 10\); go on with --resume"
        ):
            check_start(folder, resume=False)


def test_alphas_that_differ_between_processes_are_an_error_that_names_the_step():
    alpha = torch.zeros(2, 3)
    copies = alpha.repeat(2, 1, 1)

    def search(**changed):
        accelerator = SimpleNamespace(num_processes=2, gather=lambda own: copies, **changed)
        supernet = SimpleNamespace(alpha=alpha)
        return SimpleNamespace(accelerator=accelerator, supernet=supernet, step=40)

    check_alpha_is_one(search())
    copies[1, 0, 0] = 1e-45  # the smallest difference there is
    with pytest.raises(InputError, match=r"num_processes=2: alpha differs .* at step 40: stopped"):
        check_alpha_is_one(search())


def test_the_random_state_comes_back():
    state = random_state(torch.device("cpu"))
    drawn = torch.rand(4)
    restore_random_state(state)
    assert torch.equal(torch.rand(4), drawn)


def test_paths_may_move_and_names_may_not(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    options = [
        {"train": [f"{folder}/a.jsonl"], "test": f"{folder}/*.jsonl"}
        for folder in ("one", "two", tmp_path / "one")
    ]
    first, *others = map(placeless, options)
    assert others == [first, first] and first.keys() == {"train", "test"}
    for kept in (None, "json", "user/data", "hf://datasets/user/data/a.jsonl", ["x/*.jsonl"]):
        assert placeless(kept) == kept


def test_which_options_of_a_task_count():
    model, data, training = ModelConfig("user/model"), DataConfig("user/data"), TrainingConfig()
    rows = {"train": [0, 2], "validation": [1]}
    options = task_options(model, data, rows, training)

    def changed(other_rows=rows, num_workers=0, **changes):
        configs = [
            replace(config, **{k: v for k, v in changes.items() if hasattr(config, k)})
            for config in (model, data)
        ]
        trained = replace(training, num_workers=num_workers)
        other = task_options(*configs, other_rows, trained)
        return {name for name in {**options, **other} if options.get(name) != other.get(name)}

    for free in ({"gradient_checkpointing": True}, {"max_length": 9}, {"num_workers": 2}):
        assert changed(**free) == set()
    assert changed(dtype="bfloat16", split_seed=1) == {"dtype", "split_seed"}
    assert changed(max_length=9, on_long_row="truncate") == {"max_length", "on_long_row"}
    assert changed({"train": [2, 0], "validation": [1]}) == {"split"}
    assert changed(streaming=True, num_workers=2) == {"streaming", "num_workers"}


OPTIONS = {"model_name_or_path": "m", "dataset": "d", "data_files": None, "test_split": "test"}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, None),
        ({"split_seed": 3}, None),
        ({"model_name_or_path": "n"}, "model_name_or_path='n'"),
        ({"dataset": "e"}, "dataset='e'"),
        ({"data_files": "f.json"}, "data_files='f.json'"),
    ],
)
def test_what_may_be_replaced(changed, told, tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps(OPTIONS | changed))
    configs = ModelConfig("m"), DataConfig("d")
    check_not_anothers(str(tmp_path), *configs)  # nothing was trained there
    (tmp_path / "adapter_config.json").write_text("{}")
    if told is None:
        return check_not_anothers(str(tmp_path), *configs)
    options = FinetuneConfig(genotype=None, rank=4, output_dir=str(tmp_path))
    with pytest.raises(
        InputError, match=f"an adapter with {told} is there, this run has .*='?[dmN]"
    ):
        finetune(options, *configs, None)


def test_an_adapter_of_another_tool_may_be_replaced(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    check_not_anothers(str(tmp_path), ModelConfig("m"), DataConfig("d"))
