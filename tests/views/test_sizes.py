"""The predicted sizes on the screen, in a report and in TensorBoard.
Not here: what they are (../alpha/test_sizes.py), the rest of these views (their own files)."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from darts_lora import Genotype, RankSearch, SearchConfig, Supernet
from darts_lora.alpha.sizes import RATE_TEXT, predicted_loss, recommended, sizes_text
from darts_lora.config import TrainingConfig
from darts_lora.run.runs import Search, load_finetune
from darts_lora.views.charts import pictures, sizes_image
from darts_lora.views.console import show_sizes
from darts_lora.views.report import write_report
from small_models import residual


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The folder of a search without a budget, and its genotype."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    with torch.no_grad():
        x = torch.randn(64, 16)
        data = TensorDataset(x, residual(seed=7)(x))
    loader = DataLoader(data, batch_size=8)
    search = RankSearch(
        Supernet(residual(), SearchConfig(ranks=(0, 1, 2, 4), search_fraction=1.0, arch_every=1)),
        loader,
        loader,
        training=TrainingConfig(max_steps=16, logging_steps=8, batch_size=8, learning_rate=0.01),
        output_dir=str(folder),
        loss_fn=lambda model, batch: (model(batch[0]) - batch[1]).pow(2).mean(),
    )
    return folder, search.run()


def test_the_screen_has_a_row_for_each_size_and_marks_one(searched):
    _, genotype = searched
    sizes, stream = genotype.found_by["sizes"], io.StringIO()
    show_sizes(sizes, Console(file=stream, width=80))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Predicted loss of a whole run at each size:"
    assert lines[1].split() == ["rank", "parameters", "uniform", "searched", "+-", "lacks"]
    gain = sizes["base_loss"] - sizes["points"][-1]["uniform"]
    for line, point in zip(lines[2:5], sizes["points"], strict=True):
        cells = line.split()
        assert cells[:2] == [str(point["rank"]), f"{point['parameters']:,}"]
        assert cells[2:4] == [f"{point[n]:.4g}" for n in ("uniform", "searched")]
        assert cells[5] == f"{100 * point['behind'] / gain:.1f}"
        assert ("recommended" in cells) == (point == recommended(sizes))
    assert lines[5:] == [f"{sizes_text(sizes)} {RATE_TEXT}"]


def test_a_search_that_was_too_short_says_so_on_the_screen():
    stream = io.StringIO()
    show_sizes(None, Console(file=stream, width=80))
    assert stream.getvalue() == sizes_text(None) + "\n"


def finetuned(folder, name, rank, loss, parameters):
    run = folder / name
    run.mkdir()
    figures = {"loss": loss, "exact_match": None, "trainable_parameters": parameters}
    (run / "evaluation.json").write_text(json.dumps({"adapter": figures}))
    (run / "config.yaml").write_text(f"rank: {'null' if rank is None else rank}\n")
    return str(run)


def test_a_report_sets_measured_losses_beside_predicted_ones(searched, tmp_path):
    folder, genotype = searched
    sizes, search = genotype.found_by["sizes"], Search.load(str(folder))
    runs = [
        finetuned(tmp_path, "uniform", 1, 0.5, 128),
        finetuned(tmp_path, "found", None, 0.25, 200),
        finetuned(tmp_path, "larger", None, 0.2, 5000),
    ]
    finetunes = [load_finetune(run, search) for run in runs]
    write_report(search, finetunes, str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    for name, loss, size, curve in (
        ("uniform", 0.5, 128, "uniform"), ("found", 0.25, 200, "searched"),
    ):  # fmt: skip
        predicted = predicted_loss(sizes, size, curve)
        row = page[page.index(f"<td>{name}</td>") :].split("</tr>")[0]
        assert f">{loss:.4f}<" in row and f">{predicted:.4f}<" in row
        assert f">{loss - predicted:+.4f}<" in row
    outside = page[page.index("<td>larger</td>") :].split("</tr>")[0]
    assert outside.count(">-<") == 3, "exact match, and no prediction beyond the largest rank"
    assert "<h2>How much rank is needed</h2>" in page
    assert f"<td>{recommended(sizes)['rank']} (recommended)</td>" in page
    assert sizes_text(sizes).split(":")[0] in page and "<dt>Size</dt>" in page


def test_the_chart_has_the_curves_and_what_was_measured(searched):
    search = Search.load(str(searched[0]))
    plain = pictures(search, [])["sizes"]
    run = {"name": "x", "loss": 0.5, "trainable_parameters": 200, "exact_match": None}
    marked = pictures(search, [run])["sizes"]
    red = [
        np.asarray(Image.open(io.BytesIO(p)).convert("RGB")).astype(int) for p in (plain, marked)
    ]
    count = [int(((c[..., 0] > 180) & (c[..., 1] < 80) & (c[..., 2] < 80)).sum()) for c in red]
    assert count[0] == 0 < count[1], "a diamond"
    assert sizes_image(search.sizes).shape == red[0].shape


def test_a_search_with_a_budget_has_none_of_it(searched, tmp_path):
    search = Search.load(str(searched[0]))
    search.genotype = Genotype(**{**vars(search.genotype), "found_by": {}})
    assert "sizes" not in pictures(search, [])
    write_report(search, [], str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert "How much rank" not in page and "<dt>Size</dt>" not in page


def test_tensorboard_has_the_curves_the_recommendation_and_the_chart(searched):
    folder, genotype = searched
    sizes = genotype.found_by["sizes"]
    events = EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    for point in sizes["points"]:
        for curve in ("uniform", "searched"):
            (event,) = events.Scalars(f"sizes/{curve}/rank_{point['rank']}")
            assert event.value == pytest.approx(point[curve], rel=1e-5) and event.step == 16
    (event,) = events.Scalars("sizes/recommended")
    assert event.value == recommended(sizes)["rank"]
    assert len(events.Images("sizes/predicted")) == 1
    text = events.Tensors("result/text_summary")[0].tensor_proto.string_val[0].decode()
    assert sizes_text(sizes) in text
