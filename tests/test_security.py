"""Files that attack: code in them does not run, names in them stay names, bombs do not go off.
Not here: input that is only wrong (test_bad_input.py), generated input (test_fuzz.py)."""

import ast
import json
import os
import pickle
import re
import shutil
import struct
import time
import zlib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from families import TEXT_FAMILIES, make_family
from peft import PeftModel, get_peft_model
from PIL import Image as PILImage
from torch import nn

from darts_lora import Genotype, InputError
from darts_lora.base.options import RIGHTS, load_config, parse
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.data.loaders import load_splits
from darts_lora.data.places import ROW, SOURCE
from darts_lora.data.rows import row_images
from darts_lora.evaluate import EvaluateConfig, evaluate
from darts_lora.finetune import FinetuneConfig, add_adapter
from darts_lora.lora.models import load_model, load_model_config, load_processor
from darts_lora.run.runs import Search
from darts_lora.views.console import rank_tables, show
from darts_lora.views.report import write_report

ROOT = Path(__file__).parents[1]


class Attack:
    """Unpickled, it makes the folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return make_family(TEXT_FAMILIES["llama"], str(tmp_path_factory.mktemp("model")))


def calls():
    """(file, name of the function that is called, its keyword arguments) of the whole package."""
    for path in [*ROOT.glob("darts_lora/**/*.py"), *ROOT.glob("recipes/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                arguments = {k.arg: ast.unparse(k.value) for k in node.keywords}
                yield path.name, ast.unparse(node.func), arguments


def test_nothing_unpickles_and_nothing_evaluates():
    found = set()
    for path, name, arguments in calls():
        found.add(name)
        assert name not in {"eval", "exec", "yaml.load", "np.load", "pickle.load", "pickle.loads"}
        assert name != "torch.load" or arguments["weights_only"] == "True", path
        assert arguments.get("allow_pickle", "False") == "False", path
        trusted = arguments.get("trust_remote_code")
        assert trusted in (None, "trusted"), f"{path}: trust_remote_code={trusted}"
    assert {"load_file", "read_json", "loader.from_pretrained"} <= found, "it reads the calls"


def test_pickled_weights_of_a_model_do_not_run(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Attack(tmp_path / "made")}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(ModelConfig(str(folder)))
    assert not (tmp_path / "made").exists()


def test_pickled_weights_of_an_adapter_do_not_run(text_folder, tmp_path):
    config = FinetuneConfig(None, rank=2, target_modules=["q_proj"])
    base = load_model(ModelConfig(text_folder))
    add_adapter(base, config, None).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"a": Attack(tmp_path / "made")}, tmp_path / "adapter" / "adapter_model.bin")
    rows = Dataset.from_list([{"prompt": "it", "completion": "red"}] * 4)
    rows.to_json(tmp_path / "test.jsonl")
    data = DataConfig("json", {"test": str(tmp_path / "test.jsonl")})
    with pytest.raises(InputError, match="cannot be loaded into the model"):
        evaluate(EvaluateConfig(str(tmp_path / "adapter")), ModelConfig(text_folder), data)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["rows.pkl", "rows.py", "rows.pt"])
def test_pickles_and_scripts_are_no_data(tmp_path, name):
    content = pickle.dumps(Attack(tmp_path / "made"))
    if name == "rows.py":
        content = f"import os; os.mkdir({str(tmp_path / 'made')!r})".encode()
    (tmp_path / name).write_bytes(content)
    for source in ((str(tmp_path), None), ("pandas", str(tmp_path / name))):
        with pytest.raises(InputError, match="cannot be loaded"):
            load_splits(DataConfig(*source))
    assert not (tmp_path / "made").exists()


CODE = """
import os
from transformers import LlamaConfig
os.makedirs({made!r}, exist_ok=True)
class OwnConfig(LlamaConfig):
    model_type = "own"
"""


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_model_runs_by_the_users_flag_alone(text_folder, tmp_path, trusted, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    folder = shutil.copytree(text_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(made=str(tmp_path / "made")))
    model = ModelConfig(str(folder), trust_remote_code=trusted)
    if trusted:
        assert type(load_model_config(model)).__name__ == "OwnConfig"
    else:
        for load in (load_model_config, load_model):
            with pytest.raises(InputError, match=r"cannot be loaded \(.*custom code"):
                load(model)
    assert (tmp_path / "made").exists() == trusted


# Names.


class Named(nn.Module):
    """Linear layers whose names are regular expressions, or ends of others."""

    NAMES = (".*", "a|b", "a", "b", "^a$", "(a)", "a+", "[ab]", "\\w", "a$", "proj", "q_proj")

    def __init__(self):
        super().__init__()
        for name in self.NAMES:
            self.add_module(name.replace(".", "dot"), nn.Linear(4, 4))
        self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4), "a": nn.Linear(4, 4)})

    def forward(self, x):
        return self.proj(x)


@pytest.mark.parametrize("name", [n for n, _ in Named().named_modules() if n not in ("", "inner")])
def test_a_name_is_one_module_and_no_pattern(name):
    model = Named()
    others = [n for n in ("proj", "inner.a", "q_proj") if n != name]
    genotype = Genotype({name: 1, **dict.fromkeys(others, 2)})
    peft = get_peft_model(model, genotype.to_lora_config(model))
    found = {n: m.r["default"] for n, m in peft.base_model.model.named_modules() if hasattr(m, "r")}
    assert found == genotype.ranks


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "..", "a/../../b", "C:\\x", "a\x00b", "a\x1b[2Jb", "a\n"]
)
def test_names_are_no_paths_and_no_commands_to_the_screen(tmp_path, name, capsys):
    """Those that are names at all are shown, saved and reported inside the run's folder alone."""
    run = tmp_path / "outer" / "run"
    run.mkdir(parents=True)
    shapes = {name: (4, 4)}
    try:
        found = Genotype({name: 2}, shapes=shapes, candidates=[0, 2])
    except InputError as error:
        assert "dotted module names" in str(error)
        assert name not in ("/etc/passwd", "C:\\x")
        return
    found.save(run / "genotype.json")
    about = {"shapes": shapes, "candidates": [0, 2], "budget": None, "parts": {name: "vision"}}
    (run / "layers.json").write_text(json.dumps(about))
    record = {"step": 1, "seconds": 1, "train_loss": 1, "validation_gain": 1}
    record |= {"expected_parameters": 1, "expected_ranks": [1]}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    show(found)
    write_report(Search.load(str(run)), [], str(run / "report.html"))
    assert [p.name for p in (tmp_path / "outer").iterdir()] == ["run"]
    left = {"genotype.json", "layers.json", "metrics.jsonl", "report.html", "report_pictures"}
    assert {p.name for p in run.iterdir()} == left


@pytest.mark.parametrize("name", ["[/red]", "[bold]x", "$\\frac{$", "<script>x</script>"])
def test_names_are_no_markup(tmp_path, name, capsys):
    """Of rich, of matplotlib, of HTML."""
    name = f"{name}.0.proj"
    genotype = Genotype({name: 2}, shapes={name: (4, 4)}, candidates=[0, 2])
    show(genotype)
    assert name.split(".")[0] in capsys.readouterr().out
    assert len(rank_tables(genotype)) == 1
    records = [{"step": 1, "seconds": 1, "train_loss": 1, "validation_gain": 1}]
    records[0] |= {"expected_parameters": 1, "expected_ranks": [1]}
    parts, shapes = {name: "vision"}, genotype.shapes
    search = Search(str(tmp_path), shapes, [0, 2], None, parts, records, {name: name}, genotype)
    finetune = {"name": name, "loss": None, "exact_match": None, "trainable_parameters": 8}
    write_report(search, [finetune | {"base": None}], str(tmp_path / "report.html"))
    assert "<script>x" not in (tmp_path / "report.html").read_text()


def test_no_more_is_trained_than_the_genotype_names():
    """PEFT matches modules_to_save by the end of names: "head" is that of "other_head" too."""
    model = nn.ModuleDict({n: nn.Linear(4, 4) for n in ("a", "head", "other_head")})
    with pytest.raises(
        InputError, match=r"modules_to_save=\['head'\]: PEFT would train .*other_he"
    ):
        Genotype({"a": 1}, modules_to_save=["head"]).to_lora_config(model)
    with pytest.raises(InputError, match=r"modules_to_save=\['hed'\]: 'hed' is not in the model"):
        Genotype({"a": 1}, modules_to_save=["hed"]).to_lora_config(model)
    genotype = Genotype({"a": 1}, modules_to_save=["other_head"])
    peft = get_peft_model(model, genotype.to_lora_config(model))
    assert isinstance(peft, PeftModel)
    trained = {n.split(".")[2] for n, p in peft.named_parameters() if p.requires_grad}
    assert trained == {"a", "other_head"}


# Images.


@pytest.fixture
def row(tmp_path):
    PILImage.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    return lambda image: {ROW: 3, SOURCE: str(tmp_path / "rows.jsonl"), "image": image}


def test_an_image_is_a_file_and_is_not_fetched(row, tmp_path):
    assert row_images(row("red.png"))[0].getpixel((0, 0)) == (255, 0, 0)
    assert row_images(row(str(tmp_path / "red.png"))), "documented: any image that can be read"
    os.mkfifo(tmp_path / "pipe")
    for image in ("pipe", "/dev/zero"):
        with pytest.raises(InputError, match=rf"row 3, .*'{image}' .*\(no regular file\)"):
            row_images(row(image))
    for image in ("http://localhost:9/x.png", "file:///etc/hosts", "/etc/passwd", "a\x00.png"):
        with pytest.raises(InputError, match=r"row 3, column 'image': image .* does not open"):
            row_images(row(image))


def test_an_image_that_is_a_program_does_not_run(row, tmp_path):
    PILImage.new("RGB", (4, 4)).save(tmp_path / "image.eps")
    content = (tmp_path / "image.eps").read_bytes()
    for image in ("image.eps", {"bytes": content, "path": None}):
        with pytest.raises(InputError, match=r"does not open \(EPS is a program"):
            row_images(row(image))


def test_a_decompression_bomb_is_refused(row, tmp_path):
    row_images(row("red.png"))
    content = bytearray((tmp_path / "red.png").read_bytes())
    content[16:24] = struct.pack(">II", 20_000, 20_000)  # width, height; then the sum over both
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(InputError, match=r"'bomb\.png' does not open \(.*decompression bomb"):
        row_images(row("bomb.png"))


# Bombs in text.


DEEP = 200_000
BOMBS = {
    "lists in lists": "[" * DEEP,
    "objects in objects": '{"a":' * DEEP,
    "a number without end": '{"a": ' + "9" * 1_000_000 + "}",
    "one key": "{" + '"a": 1,' * 300_000 + '"a": 1}',
    "too many modules": "{" + ",".join(f'"a{i}": "x"' for i in range(300_000)) + "}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_genotype_that_is_a_bomb_is_refused_quickly(tmp_path, name):
    (tmp_path / "g.json").write_text(BOMBS[name])
    started = time.process_time()
    with pytest.raises(InputError) as error:
        Genotype.load(tmp_path / "g.json")
    assert time.process_time() - started < 10 and len(str(error.value)) < 700


ALIASES = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60))


@pytest.mark.parametrize(
    "text",
    [ALIASES, "ranks: " + "[" * DEEP, "- " * DEEP, "a: " + "{a: " * DEEP, "seed: " + "9" * 100_000],
    ids=["aliases", "lists", "block lists", "mappings", "digits"],
)
def test_a_configuration_that_is_a_bomb_is_refused_quickly(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(InputError, match="not a readable YAML file") as error:
        load_config(str(tmp_path / "c.yaml"))
    assert time.process_time() - started < 10 and len(str(error.value)) < 700


# What a model's folder says.


BAD_CONFIGS = {
    "heads": {"num_attention_heads": 0},
    "a width below 0": {"hidden_size": -8},
    "a text for a width": {"hidden_size": "wide"},
    "a width without end": {"hidden_size": 10**15},
    "another activation": {"hidden_act": "no such"},
    "a list for a vocabulary": {"vocab_size": []},
    "another type": {"dtype": "float3"},
    "another attention": {"rope_parameters": {"rope_type": "no such"}},
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_model_of_impossible_sizes(text_folder, tmp_path, case):
    folder = shutil.copytree(text_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | BAD_CONFIGS[case]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"model_name_or_path=.*: cannot be loaded \("):
        load_model(ModelConfig(str(folder)))


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "no such"}}', "\x00" * 99])
def test_a_tokenizer_that_is_none(text_folder, tmp_path, content):
    folder = shutil.copytree(text_folder, tmp_path / "model")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_processor(ModelConfig(str(folder)))


# What a file may set.


def test_the_security_page_lists_every_option_that_a_file_may_set():
    page = (ROOT / "recipes" / "SECURITY.md").read_text(encoding="utf-8")
    may, may_not = page.split("## Which options a file may set")[1].split("It may not set:")
    may_not = may_not.split("`search.py`")[0]
    shared = {f.name for c in (ModelConfig, DataConfig, TrainingConfig) for f in fields(c)}
    own = {f.name for c in (FinetuneConfig, EvaluateConfig) for f in fields(c)}
    listed = [set(re.findall(r"`([a-z_]+)`", part)) for part in (may, may_not)]
    assert listed[0] == shared - RIGHTS.keys(), "recipes/SECURITY.md: may"
    assert listed[1] == own | RIGHTS.keys(), "recipes/SECURITY.md: may not"


@pytest.mark.parametrize("recipe", ["finetune", "evaluate"])
def test_the_run_before_sets_what_the_page_says_and_nothing_else(tmp_path, recipe):
    own, *shared = {
        "finetune": (FinetuneConfig, ModelConfig, DataConfig, TrainingConfig),
        "evaluate": (EvaluateConfig, ModelConfig, DataConfig),
    }[recipe]
    options = {"output_dir": "/evil", "rank": 3, "seed": 9, "eval_batch_size": 1, "max_length": 77}
    options |= {"dtype": "bfloat16", "ranks": [1], "resume": True, "max_new_tokens": 1}
    (tmp_path / "config.yaml").write_text(json.dumps(options))
    before = "genotype" if recipe == "finetune" else "adapter"
    args = [f"--{before}", str(tmp_path / "genotype.json" if recipe == "finetune" else tmp_path)]
    found, model, data, *_ = parse(args, own, *shared, previous=before)
    assert found == own(**{before: args[1]})
    assert (model.dtype, data.max_length) == ("bfloat16", 77)
