"""recipes/benchmark/shuffled.py: answers change places, searches and retrainings run on them.
Not here: what the verdict rests on (tests/alpha/test_verdict.py)."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest

FIGURE = r"-?\d[\d.e+-]*"


@pytest.fixture(scope="module", autouse=True)
def modules(benchmark_imports):
    """The benchmark's modules."""


def chats(count):
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {i}"},
                {"role": "assistant", "content": f"answer {i % 7}"},
            ]
        }
        for i in range(count)
    ]


def test_each_row_keeps_its_question_and_takes_another_answer():
    from shuffled import shuffled

    rows = chats(70)
    mixed = shuffled(rows, 0)
    assert rows == chats(70), "the others are as they were"
    pairs = [[turn["content"] for turn in row["messages"]] for row in mixed]
    assert [question for question, _ in pairs] == [f"question {i}" for i in range(70)]
    assert Counter(answer for _, answer in pairs) == {f"answer {i}": 10 for i in range(7)}
    kept = sum(answer == f"answer {i % 7}" for i, (_, answer) in enumerate(pairs))
    assert kept < 25, "one of seven by chance"
    assert mixed != shuffled(rows, 1)


def test_a_line_for_each_search_and_a_count(quality_options, tmp_path, capsys):
    from shuffled import ShuffledRun, main

    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
    for split, count in (("train", 140), ("test", 8)):
        rows = chats(count)
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    _, search, model, data, training = quality_options
    main(
        ShuffledRun(curve=[2], budgets=[2], rates=[0.01], seeds=[0, 1], real=1, retrain_steps=2),
        replace(search, search_fraction=0.6),
        model,
        replace(data, data_files=files),
        replace(training, max_steps=64),
    )
    *lines, first, second = capsys.readouterr().out.splitlines()
    told = [line for line in lines if "answers, rank" in line]
    assert [line.partition(":")[0] for line in told] == [
        "shuffled answers, rank 2, seed 0",
        "shuffled answers, rank 2, seed 1",
        "true answers, rank 2, seed 0",
    ]
    for line in told:
        assert re.search(rf"predicted_gain {FIGURE}, .*measured gain {FIGURE}$", line)
    counts = [sum("learnt True" in line for line in told[part]) for part in (slice(2), slice(2, 3))]
    assert [first, second] == [
        f"shuffled answers: {counts[0]} of 2 learnt",
        f"true answers: {counts[1]} of 1 learnt",
    ]
