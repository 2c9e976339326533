"""Settings of the test run: few threads, no hub, repeatable; a small model and its data on disk.
Not here: what these are made of (small_models.py), nor helpers of single tests."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: fixtures import what reads it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes run tests side by side
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory) -> str:
    """Folder of a random Mllama with its processor, as save_pretrained writes them."""
    from small_models import vision_model, vision_processor

    folder, processor = str(tmp_path_factory.mktemp("model")), vision_processor()
    processor.save_pretrained(folder)
    vision_model(processor).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> str:
    """Folder of 40 training and 12 test rows for that model: train.parquet, test.parquet."""
    from small_models import vision_rows

    folder = tmp_path_factory.mktemp("data")
    for split, count in {"train": 40, "test": 12}.items():
        vision_rows(count).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture(scope="session")
def base_config(vision_folder):
    """ModelConfig of that model."""
    from darts_lora.config import ModelConfig

    return ModelConfig(vision_folder)


@pytest.fixture(scope="session")
def data(data_folder):
    """DataConfig of those rows."""
    from darts_lora.config import DataConfig

    return DataConfig(data_folder)


@pytest.fixture(scope="session")
def genotype(base_config, tmp_path_factory) -> str:
    """A genotype file with ranks 0, 2 and 4 in turn over that model's linear layers."""
    from darts_lora import Genotype
    from darts_lora.lora.models import load_model

    modules = load_model(base_config).named_modules()
    linear = (n for n, m in modules if isinstance(m, torch.nn.Linear) and n != "lm_head")
    path = tmp_path_factory.mktemp("search") / "genotype.json"
    Genotype({name: (0, 2, 4)[i % 3] for i, name in enumerate(linear)}).save(path)
    return str(path)


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory) -> str:
    """Where datasets caches what tests load: nothing is left in the home folder."""
    import datasets

    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))  # of the recipes' own processes
        yield str(folder)
