"""What TensorBoard reads back of a search, sizes, the record after a resume.
Not here: the figures themselves (test_search.py), pictures (test_rank_images.py), trackers."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from darts_lora import RankSearch, SearchConfig, Supernet
from darts_lora.config import TrainingConfig
from darts_lora.run.records import read_metrics
from darts_lora.views.rank_images import WIDEST
from darts_lora.views.search_views import DRAWING_SHARE, SCALARS, SearchViews
from darts_lora.views.trackers import Trackers
from small_models import residual

IMAGES = {"alpha/probability", "ranks/expected", "ranks/chosen", "ranks/worth/others"}
RANKS = {"expected_ranks": [1.0, 1.0, 2.0, 0.0]}  # of four layers
PATH = "vision.layers.{}.mlp.fc{}"


def views_of(folder, supernet, first_step=0, steps=1):
    second = int(time.time())
    while (folder / "tensorboard").exists() and int(time.time()) == second:
        time.sleep(0.05)  # files are read in the order of their names, which begin with a second
    trackers = Trackers(["tensorboard"], str(folder), {}, first_step=first_step)
    return SearchViews(trackers, str(folder), supernet, first_step, steps)


def read(folder):
    events = EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    return events


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search of 40 steps with a record every fifth, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    whole = {"search_fraction": 1.0, "arch_every": 1}
    supernet = Supernet(residual(), SearchConfig(ranks=(0, 1, 2), budget_rank=1, **whole))
    loader = torch.utils.data.DataLoader(torch.randn(32, 16), batch_size=8)
    search = RankSearch(
        supernet,
        loader,
        loader,
        training=TrainingConfig(max_steps=40, logging_steps=5, batch_size=8),
        output_dir=str(folder),
        loss_fn=lambda model, batch: (model(batch) - 1).pow(2).mean(),
    )
    return folder, search.run()


def test_every_scalar_is_the_searchs_own_record(searched):
    folder, genotype = searched
    events, records = read(folder), read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(5, 41, 5))
    figures = genotype.found_by["verdict"]
    results = {f"result/{n}" for n, value in figures.items() if isinstance(value, int | float)}
    assert results <= set(events.Tags()["scalars"])
    absent = set() if torch.cuda.is_available() else {"speed/peak_memory_gib"}
    tags = set(events.Tags()["scalars"]) - results
    worth = {"worth/blocks.0", "worth/blocks.1", "worth/blocks.2", "worth/blocks.3"}
    assert tags == {*SCALARS.values(), "budget/budget_parameters", *worth} - absent
    for name, tag in SCALARS.items():
        written = [(r["step"], r[name]) for r in records if r[name] is not None]
        if tag not in absent:
            found = [(e.step, e.value) for e in events.Scalars(tag)]
            assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in written]
            assert len(found) == (4 if name == "validation_gain" else 8)
    budget = genotype.found_by["budget_parameters"]
    assert {e.value for e in events.Scalars("budget/budget_parameters")} == {budget}
    assert events.Scalars("result/chosen_parameters")[0].value == genotype.num_parameters


def test_images_histograms_and_texts(searched):
    folder, genotype = searched
    events = read(folder)
    tags = events.Tags()
    assert set(tags["images"]) == IMAGES
    assert events.Images("ranks/expected")[-1].step == 40
    assert len(events.Images("ranks/chosen")) == 1
    assert {event.width for tag in IMAGES for event in events.Images(tag)} == {WIDEST}
    assert set(tags["histograms"]) == {"alpha/rank_0", "alpha/rank_1", "alpha/rank_2"}
    assert {"result/text_summary", "configuration/text_summary"} <= set(tags["tensors"])
    text = events.Tensors("result/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f"{genotype.num_parameters:,} trainable parameters" in text
    assert f"recipes/finetune.py --genotype {folder}/genotype.json" in text
    configuration = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0]
    assert b"arch_every: 1" in configuration and b"max_steps: 40" in configuration


def test_one_file_whatever_there_is_to_see(searched):
    folder, genotype = searched
    assert len(list((folder / "tensorboard").rglob("*"))) == 1
    layers = json.loads((folder / "layers.json").read_text())
    assert list(layers["shapes"]) == list(genotype.ranks) and layers["candidates"] == [0, 1, 2]
    assert layers["parts"] == dict.fromkeys(genotype.ranks, "language")


class Alpha:
    """Stands for a supernet of many layers."""

    def __init__(self, count=520, ranks=(0, 4, 8, 16, 32, 64)):
        names = [PATH.format(i // 13, i % 13) for i in range(count)]
        self.layers = dict.fromkeys(names, SimpleNamespace(shape=(64, 64)))
        self.config, self.budget = SimpleNamespace(ranks=ranks), 1000.0
        self.alpha, self.model = torch.randn(count, len(ranks)), torch.nn.Module()
        self.layer_ranks = torch.tensor(ranks).expand(count, -1)


def test_520_modules_and_1000_steps_stay_small_and_quick(tmp_path):
    supernet, figures = Alpha(), dict.fromkeys(SCALARS, 0.5)
    views = views_of(tmp_path, supernet, steps=1000)
    views.started -= 10_000  # a long run: no image is left out
    begun = time.process_time()
    for step in range(10, 1001, 10):
        supernet.alpha += 0.1 * torch.randn_like(supernet.alpha)
        views.write({"step": step, **figures, "expected_ranks": [1.25] * 520})
    took = time.process_time() - begun
    views.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert file.stat().st_size < 10e6
    assert len(read(tmp_path).Images("alpha/probability")) == 15, "every seventh record"
    assert took < 15, "a run of 1,000 steps on 520 modules takes 1,000 s and more"


def test_images_never_take_more_than_their_share_of_a_quick_run(tmp_path):
    views = views_of(tmp_path, Alpha(4), steps=1000)
    for step in range(10, 1001, 10):
        views.write({"step": step, "train_loss": 1.0, **RANKS})
    views.started -= views.drawing / DRAWING_SHARE
    views.write({"step": 1010, "train_loss": 1.0, **RANKS})
    views.close()
    drawn = [image.step for image in read(tmp_path).Images("alpha/probability")]
    assert drawn == [10, 1010], "the first, and one when the run has become long enough"


@pytest.fixture
def numbered_from_0(monkeypatch):
    """TensorBoard reads files of one second by the text of their number: 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@pytest.mark.usefixtures("numbered_from_0")
def test_a_new_search_takes_back_what_one_before_it_wrote(tmp_path):
    for steps in ((10, 20, 30), (10, 20)):
        views = views_of(tmp_path, Alpha(4))
        for step in steps:
            views.write({"step": step, "train_loss": 1.0, **RANKS})
        views.close()
    assert [event.step for event in read(tmp_path).Scalars("loss/train")] == [10, 20]


@pytest.mark.usefixtures("numbered_from_0")
def test_a_resumed_search_takes_back_what_came_after_its_checkpoint(tmp_path):
    supernet = Alpha(4)
    views = views_of(tmp_path, supernet)
    for step in (10, 20, 30):
        views.write({"step": step, "train_loss": 1 / step, **RANKS})
    views.close()
    views = views_of(tmp_path, supernet, first_step=20)
    views.write({"step": 30, "train_loss": 0.25, **RANKS})
    views.close()
    scalars = read(tmp_path).Scalars("loss/train")
    assert [(e.step, e.value) for e in scalars] == [
        (10, pytest.approx(0.1)),
        (20, pytest.approx(0.05)),
        (30, 0.25),
    ]
