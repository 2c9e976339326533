"""What decides the course of a run, where paths move and options differ.
Not here: a search (test_resume.py) or a finetune (test_finetune_resume.py) that goes on."""

from dataclasses import replace

from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.run.course import placeless, task_options


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
