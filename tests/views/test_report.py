"""The report of a search: finished, unfinished, resumed, with finetunes beside; bad folders.
Not here: the recipe as a user runs it (recipes/test_report.py), the record."""

import base64
import io
import json
import re
import shutil
import time

import pytest
import torch
from PIL import Image

from darts_lora import Genotype, InputError, RankSearch, SearchConfig, Supernet
from darts_lora.base.options import save_config
from darts_lora.config import TrainingConfig
from darts_lora.run.runs import Search, load_finetune
from darts_lora.views.console import rank_tables
from darts_lora.views.report import write_report
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
    assert "Too early to tell: 5 architecture steps say nothing" in page
    assert "<td>arch_every</td><td>2</td>" in page and "<td>max_steps</td>" in page
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
    assert search.genotype is None and search.records[-1]["step"] == 12
    assert list(search.ranks.values()) == search.records[-1]["expected_ranks"]
    (tmp_path / "out").mkdir()
    page = make_page(tmp_path)
    assert "Not finished: step 12 of a run of 20. Ranks are the expected ones." in page


def test_a_resumed_search_has_each_step_once_and_the_same_curves(finished, tmp_path):
    with pytest.raises(Killed):
        search_in(tmp_path, kill_at=20)  # behind the checkpoint at step 12 and record 14
    search_in(tmp_path, resume=True)
    whole, resumed = (Search.load(str(folder)) for folder in (finished[0], tmp_path))
    steps = [record["step"] for record in resumed.records]
    assert steps == sorted(set(steps)) == [record["step"] for record in whole.records]
    for name in ("train_loss", "validation_gain", "expected_parameters", "expected_ranks"):
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


def test_many_modules_without_numbers_take_no_minutes(tmp_path):
    """Each had a table, a picture and a panel of its own."""
    names = [f"part{i}_x" for i in range(2000)]
    shapes, parts = dict.fromkeys(names, (4, 4)), dict.fromkeys(names, "language")
    record = {"step": 1, "seconds": 1, "train_loss": 1, "validation_gain": 1}
    record |= {"expected_parameters": 1, "expected_ranks": [1] * 2000}
    genotype = Genotype(dict.fromkeys(names, 2), shapes=shapes, candidates=[0, 2])
    search = Search(str(tmp_path), shapes, [0, 2], None, parts, [record], {}, genotype)
    started = time.process_time()
    write_report(search, [], str(tmp_path / "report.html"))
    assert time.process_time() - started < 20
    assert [table.title for table in rank_tables(genotype)] == ["others"]
    with Image.open(tmp_path / "report_pictures" / "trajectories.png") as picture:
        assert picture.height < 2000


def test_a_report_replaces_its_own_files_alone(finished, tmp_path):
    folder, _ = finished
    output = tmp_path / "mine.html"
    (tmp_path / "mine_pictures").mkdir()
    (tmp_path / "mine_pictures" / "notes.txt").write_text("mine")
    for _ in range(2):
        write_report(Search.load(str(folder)), [], str(output))
    assert (tmp_path / "mine_pictures" / "notes.txt").read_text() == "mine"
    with pytest.raises(InputError, match=r"output='.*': is a folder; name a file"):
        write_report(Search.load(str(folder)), [], str(tmp_path))
    assert output.exists()


def test_what_a_genotype_says_of_its_search_is_a_mapping():
    with pytest.raises(InputError, match="must be a mapping"):
        Genotype({"a": 1}, found_by={"verdict": [1]})


@pytest.mark.parametrize("changed", [{"train_loss": 1e31}, {"seconds": 1e300}])
def test_a_record_with_numbers_that_cannot_be_drawn_is_named(finished, tmp_path, changed):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    (folder / "metrics.jsonl").write_text(json.dumps(first | changed) + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 1 is no record of this search"):
        Search.load(str(folder))
