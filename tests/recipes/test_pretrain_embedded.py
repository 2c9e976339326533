"""recipes/pretrain_embedded.py: it makes the data that the package ships, and a model like it.
Not here: what a search makes of them (../test_readme.py)."""

import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from PIL import ImageOps
from safetensors.torch import load_file

from darts_lora.config import DataConfig, ModelConfig
from darts_lora.data.collator import Collator
from darts_lora.data.loaders import load_splits
from darts_lora.data.rows import row_images
from darts_lora.evaluate import score
from darts_lora.lora.models import EMBEDDED, load_model, load_processor

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import pretrain_embedded


@pytest.fixture(scope="module")
def made(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    options = ("--output_dir", folder, "--max_steps", 2, "--batch_size", 8, "--num_workers", 0)
    return folder, launch("pretrain_embedded", *options)


@pytest.mark.parametrize("split", ["train", "test"])
def test_its_data_are_those_of_the_package(made, split, tmp_path):
    new, shipped = (
        load_dataset("parquet", data_files=str(f / "data" / f"{split}.parquet"), split="train")
        for f in (made[0], EMBEDDED)
    )
    assert new["messages"] == shipped["messages"]
    for row in range(0, len(new), 97):
        assert new[row]["image"].tobytes() == shipped[row]["image"].tobytes()


def test_its_model_has_the_shape_of_the_packages(made):
    new, shipped = (load_file(f / "model" / "model.safetensors") for f in (made[0], EMBEDDED))
    assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in shipped.items()}
    name = "tokenizer.json"
    assert (made[0] / "model" / name).read_text() == (EMBEDDED / "model" / name).read_text()
    assert "505,257 parameters" in made[1].stdout


def test_the_shipped_files_are_small_and_its_gates_are_open():
    sizes = {path.name: path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()}
    assert sizes["model.safetensors"] <= 3_000_000 and max(sizes.values()) < 5_000_000
    state = load_file(EMBEDDED / "model" / "model.safetensors")
    gates = [value for name, value in state.items() if "cross_attn_attn_gate" in name]
    assert len(gates) == 2 and all(gate.abs().min() > 0.1 for gate in gates)


def test_the_base_knows_the_questions_and_not_the_look():
    model, processor = load_model(ModelConfig()), load_processor(ModelConfig())
    rows = load_splits(DataConfig(max_test_samples=256), ["test"])["test"]
    plain = [{**row, "image": ImageOps.invert(*row_images(row))} for row in rows]
    assert score(model, plain, Collator(processor))["exact_match"] > 0.9
    assert score(model, rows, Collator(processor))["exact_match"] < 0.55


def test_its_steps_are_adamws_on_clipped_gradients():
    """On a GPU too, where they are graphs."""
    row = pretrain_embedded.read_rows("test")[0]
    row = {**row, "image": ImageOps.invert(row["image"])}  # not known: gradients to be clipped
    options = pretrain_embedded.PretrainRun(max_steps=2, batch_size=3, num_workers=0)
    # in float64: where a gradient is hardly more than rounding, AdamW steps by its sign
    trained, expected = load_model(ModelConfig()).double(), load_model(ModelConfig()).double()
    collator = Collator(load_processor(ModelConfig()))
    pretrain_embedded.pretrain(trained, collator, [row], options)
    expected.to(trained.device).train()
    optimizer = torch.optim.AdamW(expected.parameters(), options.learning_rate, weight_decay=0.01)
    for share in (1, 0.5):  # of the rate: a cosine
        optimizer.param_groups[0]["lr"] = share * options.learning_rate
        optimizer.zero_grad()
        batch = {key: value.to(trained.device) for key, value in collator([row] * 3).items()}
        expected(**batch).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        assert norm > 1
        optimizer.step()
    wanted = expected.state_dict()
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, wanted[name], msg=name)


def test_questions_of_each_kind_are_drawn_alike():
    rows = pretrain_embedded.read_rows("test")
    chosen = pretrain_embedded.choose_rows(rows, seed=3, per_image=2)
    kinds = [pretrain_embedded.kind(row) for row in chosen]
    shares = {kind: kinds.count(kind) / len(kinds) for kind in ("colour", "shape", "yes/no")}
    assert all(0.2 < share < 0.5 for share in shares.values()), shares
    images = [row["image_id"] for row in chosen]
    assert {images.count(image) for image in set(images)} <= {1, 2}, "few have one kind only"
    assert len(images) > 1.9 * len(set(images))
