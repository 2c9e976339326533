"""The report of a search: finished, unfinished, resumed, with finetunes beside; bad folders.
Not here: the recipe as a user runs it (recipes/test_recipes.py), the record."""

import base64
import html
import io
import json
import re
import shutil
import time

import pytest
import torch
from PIL import Image

from darts_lora import Genotype, InputError, RankSearch, SearchConfig, Supernet
from darts_lora.alpha.verdict import verdict_text
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
    assert "Too early to tell: 5 architecture steps say nothing" in page
    assert "<td>arch_every</td><td>2</td>" in page and "<td>max_steps</td>" in page
    assert "Finetuned models" not in page
    for name, rank in genotype.ranks.items():
        assert f'<td>{name}</td><td class="number">16 x 16</td><td class="number">{rank}<' in page


def card(page):
    """Name -> text of what stands on top, in its order."""
    (top,) = re.findall(r'<section class="card">(.*?)</section>', page, re.DOTALL)
    entries = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", top)
    return {name: html.unescape(re.sub("<.*?>", "", text)) for name, text in entries}


def test_the_card_says_what_was_found_what_it_saves_how_sure_it_is_and_what_is_next(finished):
    folder, genotype = finished
    page = make_page(folder)
    assert page.index('class="card"') < page.index("<h2>")
    told = card(page)
    adapted = sum(rank > 0 for rank in genotype.ranks.values())
    assert list(told) == ["Found", "Saves", "Verdict", "Next"]
    assert told["Found"].startswith(f"{adapted} of 4 layers adapted, ranks 1 to ")
    assert f"{genotype.num_parameters:,} trainable parameters, after 20 steps" in told["Found"]
    assert "a uniform rank of 1 on all layers, and 50% fewer than rank 2" in told["Saves"]
    assert told["Verdict"] == verdict_text(genotype.found_by["verdict"])
    assert (
        told["Next"] == f"accelerate launch recipes/finetune.py --genotype {folder}/genotype.json"
    )


def test_a_verdict_of_another_tool_is_left_out(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    genotype = Genotype.load(folder / "genotype.json")
    genotype.found_by["verdict"] = {"surprise": [1, 2]}
    genotype.save(folder / "genotype.json")
    assert list(card(make_page(folder))) == ["Found", "Saves", "Next"]


def test_it_suits_the_dark_small_screens_and_paper(finished):
    """No more than that the rules are there; how they look is for eyes."""
    page = make_page(finished[0])
    for rule in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem", "viewport"):
        assert rule in page


def test_it_opens_without_a_network_and_its_pictures_are_there(finished):
    folder, _ = finished
    page = make_page(folder)
    assert not re.search(r"(src|href)=.(?!data:)", page) and "<script" not in page
    inside = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    files = sorted((folder / "out" / "report_pictures").glob("*.png"))
    assert len(inside) == len(files) == 3
    pictures = {base64.b64decode(picture) for picture in inside}
    assert pictures == {file.read_bytes() for file in files}
    for picture in pictures:
        assert min(Image.open(io.BytesIO(picture)).size) > 30


def test_an_unfinished_search(tmp_path):
    with pytest.raises(Killed):
        search_in(tmp_path, kill_at=15)
    search = Search.load(str(tmp_path))
    assert search.genotype is None and search.records[-1]["step"] == 12
    assert list(search.ranks.values()) == search.records[-1]["expected_ranks"]
    (tmp_path / "out").mkdir()
    page = make_page(tmp_path)
    told = card(page)
    assert told["Not finished"].startswith("Step 12 of a run of 20.")
    assert told["Next"].endswith(
        f"--config {tmp_path}/config.yaml --output_dir {tmp_path} --resume"
    )


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
    for name, parameters, loss in (("uniform4", 4000, 0.6), ("<derived>", 3000, 0.5)):
        (tmp_path / name).mkdir()
        results = {"base": {**result, "loss": 2.0, "trainable_parameters": 0}}
        results["adapter"] = {**result, "loss": loss, "trainable_parameters": parameters}
        (tmp_path / name / "evaluation.json").write_text(json.dumps(results))
    runs = [load_finetune(str(tmp_path / name)) for name in ("uniform4", "<derived>")]
    page = make_page(finished[0], runs)
    plain = page.replace(' class="number"', "")
    assert "<td>uniform4</td><td>4,000</td><td>0.6000</td><td>75.0%</td>" in plain
    assert "<td>&lt;derived&gt;</td><td>3,000</td>" in plain, "names are no markup"
    assert plain.count("<td>base</td><td>0</td><td>2.0000</td>") == 1
    told = card(page)
    assert "The lowest test loss has <derived>: 0.5000 (base model 2.0000)" in told["Saves"]
    assert told["Next"] == f"python recipes/derive.py --search_dir {finished[0]} --budget_rank 1"
    assert (finished[0] / "out" / "report_pictures" / "finetunes.png").is_file()
    (finished[0] / "out" / "report_pictures" / "finetunes.png").unlink()


def test_many_modules_without_numbers_take_no_minutes(tmp_path):
    """Each had a table, a picture and a panel of its own."""
    names = [f"part{i}_x" for i in range(2000)]
    shapes, parts = dict.fromkeys(names, (4, 4)), dict.fromkeys(names, "language")
    record = {"step": 1, "seconds": 1, "train_loss": 1, "validation_gain": 1}
    record |= {"expected_parameters": 1, "expected_ranks": [1] * 2000}
    records = [record, record | {"step": 2}]
    genotype = Genotype(dict.fromkeys(names, 2), shapes=shapes, candidates=[0, 2])
    search = Search(str(tmp_path), shapes, [0, 2], None, parts, records, {}, genotype)
    started = time.process_time()
    write_report(search, [], str(tmp_path / "report.html"))
    assert time.process_time() - started < 20
    assert [table.title for table in rank_tables(genotype)] == ["others"]
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 2e6 and page.count("<td>part7_x</td>") == 1
    assert '<td>others</td><td class="number">2000</td>' in page


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
