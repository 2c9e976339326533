"""Trackers: which there are, the same figures to several, one that fails.
Not here: what of a search is shown (test_search_views.py)."""

import os

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments

from darts_lora import InputError, RankSearch, SearchConfig, Supernet
from darts_lora.config import TrainingConfig
from darts_lora.views.trackers import Trackers, Views, check_trackers
from small_models import residual


class Kept(GeneralTracker):
    """A tracker that keeps what it gets, as a user may write one for accelerate."""

    name, requires_logging_directory = "kept", False

    def __init__(self, broken=False):
        super().__init__()
        self.broken, self.scalars, self.finished = broken, [], False

    @property
    def tracker(self):
        return self.scalars

    def log(self, values, step=None):
        if self.broken:
            raise ConnectionError("no network")
        self.scalars += [(tag, step, v) for tag, v in values.items() if not isinstance(v, str)]

    def finish(self):
        self.finished = True


@pytest.fixture(scope="module")
def trackio(tmp_path_factory):
    """trackio with a folder of its own, which it fixes when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        yield pytest.importorskip("trackio")


def in_tensorboard(folder):
    events = EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    scalars = [(tag, e.step, e.value) for tag in tags["scalars"] for e in events.Scalars(tag)]
    return sorted(scalars), {(tag, e.step) for tag in tags["images"] for e in events.Images(tag)}


def in_trackio(run):
    from trackio.sqlite_storage import SQLiteStorage

    scalars, images = [], set()
    for entry in SQLiteStorage.get_logs("darts_lora", run):
        for tag, value in entry.items():
            if isinstance(value, int | float) and tag != "step":
                scalars.append((tag, entry["step"], value))
            elif isinstance(value, dict) and value["_type"] == "trackio.image":
                images.add((tag, entry["step"]))
    return sorted(scalars), images


def make_search(folder, **options):
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(torch.randn(32, 16), batch_size=8)
    return RankSearch(
        Supernet(residual(), SearchConfig(ranks=(0, 1, 2), budget_rank=1, search_fraction=1.0)),
        loader,
        loader,
        training=TrainingConfig(max_steps=8, logging_steps=2, batch_size=8),
        output_dir=str(folder),
        loss_fn=lambda model, batch: (model(batch) - 1).pow(2).mean(),
        **options,
    )


def same(one, other):
    assert [scalar[:2] for scalar in one] == [scalar[:2] for scalar in other] and one
    assert [s[2] for s in one] == pytest.approx([s[2] for s in other], rel=1e-6)


def test_a_search_writes_the_same_to_tensorboard_and_to_trackio(trackio, tmp_path):
    folder = tmp_path / "both"
    make_search(folder, report_to=["tensorboard", "trackio"]).run()
    (scalars, images), (others, pictures) = in_tensorboard(folder), in_trackio("both")
    same(scalars, others)
    assert images == pictures and ("ranks/chosen", 8) in images
    assert {step for _, step, _ in scalars} == {2, 4, 6, 8}


class Line(torch.nn.Linear):
    def forward(self, x, labels=None):
        return {"loss": (super().forward(x) - labels).pow(2).mean()}


def test_a_finetune_writes_the_same_to_tensorboard_and_to_trackio(trackio, tmp_path):
    folder, rows = tmp_path / "tuned", [{"x": torch.ones(2), "labels": torch.ones(1)}] * 8
    args = TrainingArguments(
        str(folder), max_steps=4, logging_steps=2, use_cpu=True, save_strategy="no", report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(Line(2, 1), args, train_dataset=rows)
    trainer.add_callback(Views(["tensorboard", "trackio"], str(folder), {"rank": 2}))
    trainer.train()
    (scalars, _), (others, _) = in_tensorboard(folder), in_trackio("tuned")
    same(scalars, others)
    losses = [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]
    found = [(step, value) for tag, step, value in scalars if tag == "train/loss"]
    assert [step for step, _ in found] == [2, 4]
    assert [value for _, value in found] == pytest.approx([loss for _, loss in losses])


def test_the_trackers_of_a_users_accelerator_get_the_figures(tmp_path):
    kept = Kept()
    accelerator = Accelerator(log_with=[kept])
    accelerator.init_trackers("mine")
    make_search(tmp_path, accelerator=accelerator).run()
    same(in_tensorboard(tmp_path)[0], sorted(kept.scalars))
    assert not kept.finished, "its owner does that"


def test_one_that_fails_is_left_out_and_the_others_go_on(tmp_path):
    broken, kept = Kept(broken=True), Kept()
    trackers = Trackers([], str(tmp_path), {}, more=[broken, kept], otherwise="see the file")
    with pytest.warns(UserWarning) as told:
        for step in (1, 2):
            trackers.log({"loss": 1.0}, step)
    assert [str(w.message) for w in told] == [
        "kept is left out from step 1 on (ConnectionError: no network); see the file"
    ]
    assert kept.scalars == [("loss", 1, 1.0), ("loss", 2, 1.0)]


def test_names_are_checked_before_a_run_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("darts_lora.views.trackers.get_available_trackers", lambda: ["tensorboard"])
    assert check_trackers("none") == [] == check_trackers([])
    assert check_trackers("all") == ["tensorboard"] == check_trackers(["tensorboard"] * 2)
    with pytest.raises(
        InputError, match=r"^report_to='wandb': is not installed; pip install wandb$"
    ):
        make_search(tmp_path / "run", report_to=["tensorboard", "wandb"])
    with pytest.raises(
        InputError, match=r"^report_to='tensorbord': must be one or several of .*mlflow"
    ):
        check_trackers("tensorbord")
    assert not os.path.exists(tmp_path / "run")


def test_without_trackers_the_records_are_written_all_the_same(tmp_path):
    make_search(tmp_path, report_to="none").run()
    assert not (tmp_path / "tensorboard").exists() and (tmp_path / "metrics.jsonl").exists()


def test_images_go_to_those_that_take_some(tmp_path):
    kept = Kept()
    trackers = Trackers(["tensorboard"], str(tmp_path), {}, more=[kept])
    trackers.log_images({"ranks": np.zeros((4, 6, 3), np.uint8)}, 3)
    trackers.finish()
    assert in_tensorboard(tmp_path)[1] == {("ranks", 3)} and kept.scalars == []
