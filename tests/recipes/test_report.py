"""recipes/report.py as a user runs it: on what a search left, and on a folder that is none.
Not here: what stands in the report (../test_report.py)."""

import pytest
import torch

from darts_lora import RankSearch, SearchConfig, Supernet
from darts_lora.config import TrainingConfig
from small_models import residual


@pytest.fixture
def searched(tmp_path):
    loader = torch.utils.data.DataLoader(torch.randn(32, 16), batch_size=8)
    RankSearch(
        Supernet(residual(), SearchConfig(ranks=(0, 1, 2), budget_rank=1, search_fraction=1.0)),
        loader,
        loader,
        training=TrainingConfig(max_steps=8, logging_steps=2),
        output_dir=str(tmp_path),
        loss_fn=lambda model, batch: (model(batch) - 1).pow(2).mean(),
    ).run()
    return tmp_path


def test_a_report(launch, searched):
    done = launch("report", "--search_dir", searched)
    assert done.stdout.strip() == f"Report: {searched}/report.html"
    assert "<h1>LoRA ranks found by" in (searched / "report.html").read_text()
    assert len(list((searched / "report_pictures").glob("*.png"))) == 4


def test_errors_are_one_line(launch, tmp_path):
    done = launch("report", "--search_dir", tmp_path, status=2)
    assert done.stderr.splitlines()[-1].startswith("error: search_dir=")
    assert "Traceback" not in done.stderr
