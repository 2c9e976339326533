"""recipes/search.py: what it leaves, what it prints, resume, two processes, bad input in one line.
Not here: the loop itself (../test_search.py); the embedded default (test_readme.py)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from recipes.conftest import ROOT
from safetensors.torch import load_file

from darts_lora import Genotype, InputError, SearchConfig, TrainingConfig
from darts_lora.base.options import load_config
from darts_lora.cli import search
from darts_lora.config import DataConfig, ModelConfig
from darts_lora.run.callbacks import FinetuneTrainer


def options(vision_folder, data_folder, output_dir, **changed):
    chosen = {
        "model_name_or_path": vision_folder, "dataset": data_folder, "output_dir": output_dir,
        "ranks": "[0,2,4]", "budget_rank": 2, "max_steps": 8, "batch_size": 4, "max_length": 32,
        "logging_steps": 2, "save_steps": 4, "num_workers": 1, "search_fraction": 1.0,
        "arch_every": 1, **changed,
    }  # fmt: skip
    return [part for name, value in chosen.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def searched(launch, vision_folder, data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, launch("search", *options(vision_folder, data_folder, folder), fresh=True)


def test_what_it_leaves(searched, vision_folder):
    folder, _ = searched
    genotype = Genotype.load(folder / "genotype.json")
    assert max(genotype.ranks.values()) <= 4 and len(genotype.ranks) > 20
    assert genotype.num_parameters <= genotype.found_by["budget_parameters"]
    assert genotype.base_model == vision_folder
    config = load_config(folder / "config.yaml")
    assert config["ranks"] == [0, 2, 4] and config["arch_every"] == 1
    rows = json.loads((folder / "split.json").read_text())
    assert len(rows["train"]) == 27 and len(rows["validation"]) == 13, "by whole prompts"
    assert not set(rows["train"]) & set(rows["validation"])
    assert re.fullmatch("[0-9a-f]{16}", rows["digest"])
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [
        "step-0000004",
        "step-0000008",
    ]
    assert list((folder / "tensorboard").iterdir())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [r["step"] for r in records] == [2, 4, 6, 8]
    assert any("cross_attn" in key for key in load_file(folder / "supernet.safetensors"))


def test_one_process_ends_with_the_adapter_of_the_two_recipes(
    launch, vision_folder, data_folder, tmp_path
):
    """To the bit: model and weights are those that files give back."""
    one, two = (tmp_path / name for name in ("one", "two"))
    half = {"search_fraction": 0.5}
    searches = [options(vision_folder, data_folder, to, **half) for to in (one, two)]
    done = launch("search", *searches[0], "--finetune_dir", one / "ft")
    assert f"recipes/evaluate.py --adapter {one}/ft" in done.stdout
    launch("search", *searches[1])
    launch("finetune", "--genotype", two / "genotype.json", "--output_dir", two / "ft")
    record = json.loads((two / "ft" / "finetune.json").read_text())
    assert (record["first_step"], record["steps"], record["init"]) == (4, 4, "inherit")
    own, other = (load_file(folder / "ft" / "adapter_model.safetensors") for folder in (one, two))
    assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)


def test_what_the_user_sees(searched):
    folder, done = searched
    genotype = Genotype.load(folder / "genotype.json")
    assert re.search(r"train: 27 rows, \d+% of the text's tokens supervised", done.stdout)
    assert f"{len(genotype.ranks)} layers, candidate ranks [0, 2, 4]" in done.stdout
    assert "model.vision_model.transformer.layers" in done.stdout
    assert f"{genotype.num_parameters:,} trainable parameters" in done.stdout
    assert re.search(r"Too early to tell: \d+ architecture steps.*", done.stdout)
    assert f"recipes/finetune.py --genotype {folder}/genotype.json" in done.stdout
    assert re.search(r"8/8 \[\d+:\d+<00:00", done.stderr), "a bar with the time left"
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    bars = r"(images|tokens|search|Loading weights|Map|Generating .*|Saving .*): +[\d?]"
    notice = r"The following values were not|\t`--|To avoid this warning|\t"
    other = [line for line in lines if not re.match(f"{notice}|{bars}", line)]
    assert not other, "what nobody can act on"


def test_resume_ends_as_the_run_in_one_go(searched, launch, vision_folder, data_folder, tmp_path):
    """Also with a larger max_length, as a row that is too long asks for."""
    folder, _ = searched
    whole = Genotype.load(folder / "genotype.json")
    middle = "checkpoints/step-0000004"
    shutil.copytree(folder / middle, tmp_path / middle)
    launch("search", *options(vision_folder, data_folder, tmp_path, max_length=64), "--resume")
    assert Genotype.load(tmp_path / "genotype.json") == whole


def test_sigterm_to_the_whole_job_then_a_resume_with_other_options(
    launch, vision_folder, data_folder, tmp_path
):
    chosen = options(vision_folder, data_folder, tmp_path, max_steps=2000, save_steps=2000)
    run = subprocess.Popen(
        [sys.executable, "recipes/search.py", *map(str, chosen)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    if run.poll() is None:  # else it says below why it ended
        os.killpg(run.pid, signal.SIGTERM)  # the data worker too
    _, told = run.communicate(timeout=60)
    assert run.returncode == 143, told[-3000:]
    (line,) = [line for line in told.splitlines() if line.startswith("SIGTERM: stopped after step")]
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert line.endswith(f"the last checkpoint is {kept}, --resume goes on from it")
    assert "Traceback" not in told

    config = (tmp_path / "config.yaml").read_text()
    changed = options(vision_folder, data_folder, tmp_path, max_steps=2000, pad_to_multiple_of=8)
    done = launch("search", *changed, "--resume", status=2)
    told = "error: pad_to_multiple_of=8: the search to resume has pad_to_multiple_of=1; go on with"
    assert told in done.stderr
    assert (tmp_path / "config.yaml").read_text() == config


def test_two_processes_search_together(launch, vision_folder, data_folder, tmp_path):
    chosen = options(vision_folder, data_folder, tmp_path, batch_size=2, seed=1)
    done = launch("search", *chosen, processes=2, fresh=True)
    assert done.stdout.count("trainable parameters") == 1, "one process speaks"
    genotype = Genotype.load(tmp_path / "genotype.json")
    assert genotype.num_parameters <= genotype.found_by["budget_parameters"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ranks": "[0,64]"}, "ranks=[0, 64]: rank 64 is above"),
        ({"target_modules": "[q_porj]"}, "target_modules=['q_porj']"),
        ({"output_dir": "/proc/nowhere"}, "output_dir='/proc/nowhere': cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    launch, vision_folder, data_folder, tmp_path, changed, message
):
    chosen = options(vision_folder, data_folder, **{"output_dir": tmp_path / "run", **changed})
    done = launch("search", *chosen, status=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "genotype.json").exists()


class Run:
    """A search of four steps and its finetune of four, in this process."""

    def __init__(self, folder, vision_folder, data_folder):
        self.folder = folder
        self.configs = (
            SearchConfig(ranks=(0, 2, 4), budget_rank=2, search_fraction=0.5),
            ModelConfig(vision_folder), DataConfig(data_folder, max_length=32),
            TrainingConfig(max_steps=8, batch_size=4, save_steps=1, learning_rate=0.01),
        )  # fmt: skip

    def __call__(self, resume=False):
        AcceleratorState._reset_state()
        options = search.SearchRun(str(self.folder), resume, str(self.folder / "ft"))
        search.main(options, *self.configs)

    @property
    def adapter(self):
        return (self.folder / "ft" / "adapter_model.safetensors").read_bytes()


def cut_off(patch, step):
    """Let a finetune die in that step."""
    train = FinetuneTrainer.training_step

    def dies(self, *args):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return train(self, *args)

    patch.setattr(FinetuneTrainer, "training_step", dies)


def test_a_whole_run_goes_on_where_it_was(vision_folder, data_folder, tmp_path, monkeypatch):
    whole, cut = (Run(tmp_path / name, vision_folder, data_folder) for name in ("whole", "cut"))
    whole()
    rows = json.loads((whole.folder / "split.json").read_text())
    assert len(rows["taken"]) == 16 and set(rows["taken"]) < set(rows["train"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_off(patch, 2)
        cut()
    with pytest.raises(InputError, match=r"an unfinished finetune is there \(step 2 of 4\); go on"):
        Run(tmp_path / "cut", vision_folder, data_folder)()
    cut(resume=True)
    assert cut.adapter == whole.adapter
    with monkeypatch.context() as patch:
        cut_off(patch, 0)
        cut(resume=True)  # nothing is left to do
    assert cut.adapter == whole.adapter


def test_a_finetune_of_another_search_is_not_gone_on_with(
    vision_folder, data_folder, tmp_path, monkeypatch
):
    run = Run(tmp_path, vision_folder, data_folder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_off(patch, 2)
        run()
    shutil.rmtree(tmp_path / "checkpoints" / "step-0000004")
    (tmp_path / "genotype.json").unlink()
    with pytest.raises(InputError, match=r"output_dir='.*ft': an unfinished finetune is there"):
        run(resume=True)
