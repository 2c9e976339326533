"""recipes/finetune.py: what a user gives, sees and gets.
Not here: the training itself (../test_finetune.py)."""

import json
import re

from peft import PeftModel
from safetensors.torch import load_file

from darts_lora import Genotype
from darts_lora.base.options import load_config
from darts_lora.config import ModelConfig
from darts_lora.lora.models import load_model


def test_it_retrains_with_the_options_of_the_search(finetuned, vision_folder, search_dir):
    folder, _ = finetuned
    options = load_config(folder / "config.yaml")
    assert options["model_name_or_path"] == vision_folder
    assert (options["max_steps"], options["batch_size"], options["learning_rate"]) == (4, 8, 0.01)
    assert options["save_steps"] == 2, "given on the command line"
    assert options["seed"] == 0, "the search's seed is its own"
    record = json.loads((folder / "finetune.json").read_text())
    genotype = Genotype.load(search_dir / "genotype.json")
    assert record["trainable_parameters"] == genotype.num_parameters
    assert record["steps"] == 4 and record["rows"] == 40
    assert [step for step, _ in record["losses"]] == [2, 4]


def test_it_leaves_a_plain_peft_adapter(finetuned, vision_folder):
    folder, _ = finetuned
    model = PeftModel.from_pretrained(load_model(ModelConfig(vision_folder)), folder)
    state = load_file(folder / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in state.items() if "lora_A" in name} == {2, 4}
    assert any(t.abs().sum() > 0 for name, t in state.items() if "lora_B" in name)
    assert not (folder / "checkpoints").exists(), "they serve to get here"
    assert model.peft_config["default"].r == 4


def test_what_the_user_sees(finetuned, search_dir, vision_folder, data_folder):
    folder, done = finetuned
    assert f"not given are those of {search_dir / 'config.yaml'}\n" in done.stdout
    assert f"Model {vision_folder}, data {data_folder}\n" in done.stdout
    record = json.loads((folder / "finetune.json").read_text())
    assert f"{record['trainable_parameters']:,} trainable parameters" in done.stdout
    assert f"loss {record['loss']:.4f} after 4 steps" in done.stdout
    assert f"recipes/evaluate.py --adapter {folder}" in done.stdout
    assert re.search(r"4/4 \[\d+:\d+<00:00", done.stderr), "a bar with the time left"
    assert "Traceback" not in done.stderr and "{'" not in done.stdout + done.stderr


def test_bad_input_is_one_line_and_status_2(launch, tmp_path):
    options = ("--genotype", "nowhere.json", "--output_dir", tmp_path)
    done = launch("finetune", *options, status=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    assert line.startswith("error: genotype='nowhere.json': no such file; run ")
    assert not list(tmp_path.iterdir())


def test_two_processes_train_on_a_stream_and_go_on(launch, search_dir, tmp_path):
    """Their batches are of different lengths, each padded for itself."""
    options = ("--genotype", search_dir / "genotype.json", "--output_dir", tmp_path)
    options += ("--streaming", "true", "--batch_size", 2, "--logging_steps", 1)
    done = launch("finetune", *options, "--max_runtime", 0.0001, processes=2, status=75)
    kept = tmp_path / "checkpoints" / "checkpoint-1"
    assert f"stopped after step 1 of 4; the last checkpoint is {kept}, --resume" in done.stderr
    assert {"rng_state_0.pth", "rng_state_1.pth"} < {path.name for path in kept.iterdir()}
    launch("finetune", *options, "--resume", processes=2)
    record = json.loads((tmp_path / "finetune.json").read_text())
    assert record["steps"] == 4 and [step for step, _ in record["losses"]] == [1, 2, 3, 4]
    assert (tmp_path / "adapter_model.safetensors").exists()
