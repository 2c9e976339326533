"""recipes/benchmark/size*.py: tables and plots of recommended sizes, rows of the tasks.
Not here: the searches and sweeps (test_quality.py), how a size is recommended (alpha/)."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
from datasets import load_from_disk
from PIL import Image

from darts_lora import InputError, SearchConfig
from darts_lora.base.options import parse
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig

BENCHMARK = Path(__file__).parents[2] / "recipes" / "benchmark"


def test_the_table_of_recommended_sizes_is_that_of_its_command(benchmark_imports, capsys):
    tables = importlib.import_module("size_tables")
    tables.main(tables.TablesRun())
    lines = capsys.readouterr().out.splitlines()
    note = (Path(tables.__file__).parent / "notes" / "sizes.md").read_text()
    assert len(lines) > 2 and all(line in note for line in lines[2:])


def test_searches_without_a_budget_are_kept_and_compared(benchmark_imports, tmp_path, capsys):
    size, tables = map(importlib.import_module, ("size", "size_tables"))
    published = Path(tables.TablesRun().output_dir)
    found = size.read_searches(published / "embedded_color.searches.jsonl")
    task = tmp_path / "embedded_color"
    task.mkdir()
    (tmp_path / "embedded_color.jsonl").write_text((published / "embedded_color.jsonl").read_text())
    found[0]["found_by"]["sizes"]["points"][0]["behind"] = 0.0
    (task / "searches.jsonl").write_text(json.dumps(found[0]) + "\n")
    plot = tmp_path / "sizes.png"
    tables.main(tables.TablesRun(str(tmp_path), plot=str(plot)))
    with Image.open(plot) as picture:
        assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(10**6)) > 10
    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert row.split(" | ")[:4] == ["| embedded_color", "0", "1", "2"], "1 lacks nothing there"
    found[0]["found_by"]["sizes"] = None
    (task / "searches.jsonl").write_text(json.dumps(found[0]) + "\n")
    with pytest.raises(InputError, match="too short"):
        tables.main(tables.TablesRun(str(tmp_path)))


def test_tasks_of_other_questions_directions_and_labels(benchmark_imports, tmp_path):
    tasks = importlib.import_module("size_tasks")
    record = "name[Aromi], customer rating[3 out of 5]"
    steps = [
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.",
        "She sold 48+24 = $<<48+24=72>>72 and then 2*3=<<2*3=6>>6 clips altogether.",  # two
        "That is 2*3+1=<<2*3+1=7>>7 clips in all.",  # two operations
        "So 17 of the 20 beans - 3 = <<20-3=17>>17 are red beans.",
        "A step without a number that is computed.",
        "3+1=<<3+1=4>>4",  # nothing to tell it by
    ]
    for name, question, answer in (
        ("e2e", record, "Aromi has three stars."),
        ("e2e", "name[Aromi]", "It has no rating."),
        ("e2e", record, "long " * 21),
        ("gsm8k", "How many clips?", "\n".join(steps)),
    ):
        row = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        with open(tmp_path / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": row}) + "\n")
    e2e, gsm8k = ([str(tmp_path / f"{name}.jsonl")] for name in ("e2e", "gsm8k"))
    tasks.main(tasks.TasksRun(str(tmp_path / "out"), turned=e2e, ratings=e2e, operations=gsm8k))

    def written(name):
        return [json.loads(line) for line in open(tmp_path / "out" / name, encoding="utf-8")]

    first = written("turned_e2e.jsonl")[0]["messages"]
    assert [m["content"] for m in first] == ["Aromi has three stars.", record]
    assert written("rating_e2e.jsonl") == [{"text": "Aromi has three stars.", "label": 4}]
    assert written("operation_gsm8k.jsonl") == [
        {"text": "Natalia sold 24 clips in May.", "label": 3},
        {"text": "So 17 of the 20 beans 17 are red beans.", "label": 1},
    ]
    for name, answers in {"yes_no": {"yes", "no"}, "color": {"red", "blue", "green"}}.items():
        splits = load_from_disk(str(tmp_path / "out" / f"embedded_{name}"))
        assert set(splits) == {"train", "test"}
        found = {messages[-1]["content"] for messages in splits["test"]["messages"]}
        assert answers <= found and (name == "color" or answers == found)


@pytest.mark.parametrize("name", ["embedded_color", "minilm_operation", "minilm_rating"])
def test_the_configurations_of_sizes_are_read(benchmark_imports, name):
    cells = importlib.import_module("quality_cells")
    path = BENCHMARK / "size" / f"{name}.yaml"
    classes = (cells.QualityRun, SearchConfig, ModelConfig, DataConfig, TrainingConfig)
    options, search, model, *_ = parse(["--config", str(path)], *classes)
    assert options.benchmark == name and search.budget_parameters is search.budget_rank is None
    assert (model.task == "classification") is name.startswith("minilm")


def test_rules_of_the_scaling_are_alike_at_one_rank_and_unlike_at_others(quality_options, tmp_path):
    rates = importlib.import_module("size_rates")
    options, search, model, data, training = quality_options
    wanted = rates.RatesRun(tried=[2, 8], results=str(tmp_path / "rates.jsonl"))
    everything = options, search, model, data, dataclasses.replace(training, max_steps=4)
    rates.main(wanted, *everything)
    written = (tmp_path / "rates.jsonl").read_text()
    done = [json.loads(line) for line in written.splitlines()]
    assert len(done) == 2 * (3 + 1), "two rates; at rank 8 all rules are one"
    losses = [d["loss"] for d in done if (d["rank"], d["rate"]) == (2, 0.03)]
    assert len(set(losses)) == 3
    (line,) = (row for row in rates.table(done).splitlines() if "1 / r |" in row)
    best = min((d for d in done if d["rule"] == "1 / r"), key=lambda d: d["loss"])
    assert f"**{best['loss']:.4f}**" in line and line.count("**") == 2
    rates.main(wanted, *everything)
    assert (tmp_path / "rates.jsonl").read_text() == written, "nothing is run again"
