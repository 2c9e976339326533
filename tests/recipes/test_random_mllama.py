"""recipes/benchmark/random_mllama.py, tiny: the search that it is for runs on what it writes.
Not here: the 11B shape itself, which needs a large GPU."""

import json

import pyarrow.parquet
from transformers import AutoConfig


def test_a_tiny_one_is_searched_with_the_papers_configuration(launch, tmp_path):
    launch("benchmark/random_mllama", "--tiny", "--output_dir", tmp_path, alone=True)
    assert AutoConfig.from_pretrained(tmp_path / "model").model_type == "mllama"
    rows = pyarrow.parquet.read_table(tmp_path / "data" / "train.parquet")
    assert rows.num_rows == 32 and set(rows.column_names) == {"prompt", "completion", "image"}
    options = {
        "config": "recipes/configs/llama_3_2_11b_vision_ocrvqa.yaml",
        "model_name_or_path": tmp_path / "model", "dataset": tmp_path / "data",
        "dataset_config": "null", "max_steps": 3, "search_fraction": 1.0, "save_steps": 0,
        "gradient_accumulation_steps": 1, "logging_steps": 1, "num_workers": 0,
        "output_dir": tmp_path / "search",
    }  # fmt: skip
    launch("search", *[part for name, value in options.items() for part in (f"--{name}", value)])
    records = [json.loads(line) for line in (tmp_path / "search" / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[-1]["validation_gain"] is not None and records[-1]["peak_memory_gib"] is None
