"""What the recipe tests share: recipes in processes of their own, one finetuned adapter.
Not here: the small model and its data (../conftest.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import yaml
from families import TEXT_FAMILIES, make_family
from torch import nn

from darts_lora import Genotype, SearchConfig
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.lora.models import load_model

ROOT = Path(__file__).parents[2]
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")


@pytest.fixture(scope="module")
def recipe_imports():
    """Recipes are scripts, their folder is no package: here it can be imported from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes")
        yield


@pytest.fixture(scope="module")
def benchmark_imports():
    """The same for those of recipes/benchmark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes" / "benchmark")
        yield


@pytest.fixture(scope="module")
def quality_options(benchmark_imports, tmp_path_factory):
    """Options of a run of quality.py on a tiny Llama and 48 rows of text."""
    from quality_cells import QualityRun

    root = tmp_path_factory.mktemp("quality")
    model = make_family(TEXT_FAMILIES["llama"], str(root / "model"))
    colours = ["red", "green", "blue"]
    for split, count in (("train", 48), ("test", 12)):
        questions = ("which colour is it please", "is it")
        rows = [
            {"prompt": f"{questions[i % 2]} {colours[i % 3]}", "completion": colours[i % 3]}
            for i in range(count)
        ]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = QualityRun(
        benchmark="tiny", output_dir=str(root / "runs"), curve=[1, 2], budgets=[2], seeds=[0],
        learning_rates=[0.01, 0.03], eval_batch_size=5, exact_match=True,
    )  # fmt: skip
    files = {split: str(root / f"{split}.jsonl") for split in ("train", "test")}
    return (
        options,
        SearchConfig(ranks=(0, 1, 2, 4)),
        ModelConfig(model),
        DataConfig("json", files, pad_to_multiple_of=4),
        TrainingConfig(max_steps=12, batch_size=8),
    )


@pytest.fixture(scope="session")
def launch(datasets_cache):
    """launch("finetune", option, value ...) -> the finished process of that recipe.

    `fresh=True`: by accelerate launch, as a user does. Else it is forked, which takes no time.
    """

    def run(recipe: str, *options, fresh: bool = False, status: int = 0, processes: int = 1):
        script = ROOT / "recipes" / f"{recipe}.py"
        if fresh:
            config = "recipes/accelerate_configs/ddp.yaml" if processes > 1 else None
            kind = ["--config_file", config] if config else ["--cpu"]  # which runs one process only
            done = subprocess.run(
                [*LAUNCH, *kind, "--num_processes", str(processes), script, *map(str, options)],
                cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100",
                     "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
        else:
            done = forked.run(script, *options, folder=ROOT, processes=processes)
        assert done.returncode == status, done.stderr[-3000:]
        return done

    return run


@pytest.fixture(scope="session")
def search_dir(vision_folder, data_folder, tmp_path_factory) -> Path:
    """What a search leaves: genotype.json with probabilities, and the options it ran with."""
    folder = tmp_path_factory.mktemp("search")
    model = load_model(ModelConfig(vision_folder))
    shapes = {
        name: (m.in_features, m.out_features)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    }
    Genotype(
        {name: (0, 2, 4)[i % 3] for i, name in enumerate(shapes)},
        shapes=shapes,
        candidates=[0, 2, 4],
        probabilities={
            name: [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]][i % 3]
            for i, name in enumerate(shapes)
        },
        base_model=vision_folder,
        found_by={"budget_parameters": None},
    ).save(folder / "genotype.json")
    options = {
        "model_name_or_path": vision_folder, "dataset": data_folder, "max_length": 32,
        "max_steps": 4, "batch_size": 8, "logging_steps": 2, "learning_rate": 0.01,
        "ranks": [0, 2, 4], "seed": 5,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    return folder


@pytest.fixture(scope="session")
def finetuned(launch, search_dir, tmp_path_factory):
    """A finetune of four steps: its folder and its finished process."""
    folder = tmp_path_factory.mktemp("finetune")
    options = ("--genotype", search_dir / "genotype.json", "--output_dir", folder)
    return folder, launch("finetune", *options, "--save_steps", 2)
