"""The report of a search: finished, unfinished, resumed, with finetunes beside; bad folders.
Not here: the recipe as a user runs it (recipes/test_report.py), the record."""

import base64
import io
import json
import re

import pytest
import torch
from PIL import Image

from darts_lora import RankSearch, SearchConfig, Supernet
from darts_lora.cli import save_config
from darts_lora.config import TrainingConfig
from darts_lora.report import write_report
from darts_lora.runs import Search, load_finetune
from small_models import residual


class Killed(Exception):
    """Stands for the end of a process."""


def search_in(folder, resume=False, kill_at=None):
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        if len(calls) == kill_at:
            raise Killed
        return (model(batch) - 1).pow(2).mean()

    torch.manual_seed(0)
    supernet = Supernet(
        residual(), SearchConfig(ranks=(0, 1, 2), budget_rank=1, search_fraction=1.0)
    )
    loader = torch.utils.data.DataLoader(torch.randn(32, 16), batch_size=8)
    training = TrainingConfig(max_steps=20, logging_steps=2, save_steps=6)
    save_config(str(folder), supernet.config, training)
    search = RankSearch(
        supernet, loader, loader, training=training, output_dir=str(folder), loss_fn=loss_fn
    )
    return search.run(resume)


def make_page(folder, finetunes=()):
    output = folder / "out" / "report.html"
    write_report(Search.load(str(folder)), list(finetunes), str(output))
    return output.read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "out").mkdir()
    return folder, search_in(folder)


def test_a_finished_search(finished):
    folder, genotype = finished
    page = make_page(folder)
    assert f"{genotype.num_parameters:,} trainable parameters; 20 steps" in page
    assert "two halves of the architecture steps agree" in page
    assert "<td>arch_learning_rate</td><td>0.03</td>" in page and "<td>max_steps</td>" in page
    assert "Finetuned models" not in page


def test_it_opens_without_a_network_and_its_pictures_are_there(finished):
    folder, _ = finished
    page = make_page(folder)
    assert not re.search(r"(src|href)=.(?!data:)", page) and "<script" not in page
    inside = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    files = sorted((folder / "out" / "report_pictures").glob("*.png"))
    assert len(inside) == len(files) == 5
    pictures = {base64.b64decode(picture) for picture in inside}
    assert pictures == {file.read_bytes() for file in files}
    for picture in pictures:
        assert min(Image.open(io.BytesIO(picture)).size) > 30
    assert "@media print" in page


def test_an_unfinished_search(tmp_path):
    with pytest.raises(Killed):
        search_in(tmp_path, kill_at=15)
    search = Search.load(str(tmp_path))
    assert search.genotype is None and search.records[-1]["step"] == 8
    assert list(search.ranks.values()) == search.records[-1]["expected_ranks"]
    (tmp_path / "out").mkdir()
    page = make_page(tmp_path)
    assert "Not finished: step 8 of a run of 20. Ranks are the expected ones." in page


def test_a_resumed_search_has_each_step_once_and_the_same_curves(finished, tmp_path):
    with pytest.raises(Killed):
        search_in(tmp_path, kill_at=20)  # behind the checkpoint at step 6 and the record of step 8
    search_in(tmp_path, resume=True)
    whole, resumed = (Search.load(str(folder)) for folder in (finished[0], tmp_path))
    steps = [record["step"] for record in resumed.records]
    assert steps == sorted(set(steps)) == [record["step"] for record in whole.records]
    for name in ("train_loss", "validation_loss", "expected_parameters", "expected_ranks"):
        assert [r[name] for r in resumed.records] == [r[name] for r in whole.records], name


def test_finetunes_stand_side_by_side(finished, tmp_path):
    result = {"loss": 0.5, "exact_match": 0.75, "rows": 8}
    for name, parameters in (("uniform4", 4000), ("<derived>", 3000)):
        (tmp_path / name).mkdir()
        results = {"base": {**result, "loss": 2.0, "trainable_parameters": 0}}
        results["adapter"] = {**result, "trainable_parameters": parameters}
        (tmp_path / name / "evaluation.json").write_text(json.dumps(results))
    runs = [load_finetune(str(tmp_path / name)) for name in ("uniform4", "<derived>")]
    page = make_page(finished[0], runs)
    assert "<td>uniform4</td><td>4,000</td><td>0.5000</td><td>75.0%</td>" in page
    assert "<td>&lt;derived&gt;</td><td>3,000</td>" in page, "names are no markup"
    assert page.count("<td>base</td><td>0</td><td>2.0000</td>") == 1
    assert (finished[0] / "out" / "report_pictures" / "finetunes.png").is_file()
    (finished[0] / "out" / "report_pictures" / "finetunes.png").unlink()
