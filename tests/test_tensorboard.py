"""The views: what TensorBoard reads back, the heatmap's pixels, the record after a resume.
Not here: the figures themselves (test_search.py)."""

import io

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from darts_lora import SearchConfig, Supernet
from darts_lora.tensorboard import SCALARS, SearchViews, probability_image, read_metrics
from small_models import residual

IMAGE = "alpha/probability (layers down, ranks across)"


def record(step, **figures):
    return dict.fromkeys(SCALARS, None) | {"step": step, "train_loss": 1 / step, **figures}


@pytest.fixture
def supernet():
    return Supernet(residual(), SearchConfig(ranks=(0, 1, 2), budget_rank=1))


def read(folder):
    events = EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    return events


def test_tensorboard_reads_what_was_written(tmp_path, supernet):
    with torch.no_grad():
        supernet.arch_parameters()[1].copy_(torch.tensor([0.0, 50.0, 0.0]))
    views = SearchViews(str(tmp_path))
    for step in (10, 20):
        views.write(record(step, entropy=0.5), supernet)
    views.close()
    events = read(tmp_path)
    tags = events.Tags()
    assert set(tags["scalars"]) == {"loss/train", "alpha/entropy", "budget/budget_parameters"}
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [
        (10, pytest.approx(0.1)),
        (20, pytest.approx(0.05)),
    ]
    assert events.Scalars("budget/budget_parameters")[0].value == supernet.budget
    picture = Image.open(io.BytesIO(events.Images(IMAGE)[0].encoded_image_string)).convert("L")
    assert picture.size == (3 * 8, 4 * 8)
    assert picture.getpixel((8 + 4, 8 + 4)) == 0, "layer 1 has rank 1 for certain: black"
    assert picture.getpixel((4, 8 + 4)) == 255


def test_the_heatmap_is_white_at_0_and_black_at_1():
    image = probability_image(torch.tensor([[0.0, 1.0, 0.5]]))
    assert image.dtype == torch.uint8 and image.shape == (1, 8, 24)
    assert image[0, 0, ::8].tolist() == [255, 0, 128]


def test_a_resumed_search_takes_back_what_came_after_its_checkpoint(tmp_path, supernet):
    views = SearchViews(str(tmp_path))
    for step in (10, 20, 30):
        views.write(record(step), supernet)
    views.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4')  # the line that was being written when it was killed
    views = SearchViews(str(tmp_path), first_step=20)
    views.write(record(30, entropy=0.25), supernet)
    views.close()
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["entropy"]) for r in found] == [(10, None), (20, None), (30, 0.25)]
    assert [e.step for e in read(tmp_path).Scalars("loss/train")] == [10, 20, 30]
