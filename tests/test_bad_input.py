"""Bad input to the recipes, a table: what is given, and the one line that is told, status 2.
Not here: rows and images (test_rows.py), single bounds (test_config.py), run folders
(test_runs.py), generated input (test_fuzz.py), files that attack (test_security.py)."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from darts_lora import Genotype
from darts_lora.config import ModelConfig
from darts_lora.finetune import FinetuneConfig, add_adapter
from darts_lora.lora.models import load_model

RECIPES = Path(__file__).parents[1] / "recipes"
GENOTYPE = {
    "version": 1, "ranks": {"a": 2, "b.c": 0}, "shapes": {"a": [8, 4], "b.c": [8, 8]},
    "candidates": [0, 2], "probabilities": {"a": [0.2, 0.8], "b.c": [0.5, 0.5]},
    "found_by": {"budget_parameters": 24},
}  # fmt: skip


def genotype(**changed) -> str:
    return json.dumps(GENOTYPE | changed)


# id: options of the search, beside a model and data that are good; what is told
SEARCH = {
    "a rank twice": ("--ranks [2,2]", "ranks=(2, 2): candidate ranks must be distinct integers >="),
    "a negative rank": ("--ranks [-1,2]", "ranks=(-1, 2): candidate ranks must be distinct"),
    "rank 0 alone": ("--ranks [0]", "ranks=(0,): candidate ranks must be distinct integers >= 0, "),
    "no ranks": ("--ranks []", "ranks=(): candidate ranks must be distinct integers >= 0, at"),
    "half a rank": ("--ranks [1.5]", "\"ranks\": Expected a <class 'int'>. Got value: 1.5"),
    "ranks that are no list": ("--ranks 4", "\"ranks\": Expected a <class 'tuple'>. Got value: 4"),
    "an open list": ("--ranks [1", "\"ranks\": Expected a <class 'tuple'>. Got value: [1"),
    "a rank above a layer": ("--ranks [64]", "ranks=[64]: rank 64 is above 16, the smaller side"),
    "two budgets": (
        "--budget_rank 1 --budget_parameters 9",
        "budget_rank=1.0 and budget_parameters=9: give one of the two",
    ),
    "a negative budget": ("--budget_rank -1", "budget_rank=-1.0: must be a number > 0"),
    "a budget out of reach": (
        "--ranks [1,2] --budget_rank 9",
        "are outside what the candidates allow",
    ),
    "a broken regex": ("--target_modules (q", "target_modules='(q': is no regular expression"),
    "a target that is not there": ("--target_modules [q_porj]", "matches no module; nearest names"),
    "an empty target": ("--target_modules ['']", "target_modules=['']: must be a list of module"),
    "all excluded": (
        "--target_modules [q_proj] --exclude_modules [q_proj]",
        "target_modules=['q_proj'], exclude_modules=['q_proj']: matches no module; nearest names",
    ),
    "a norm to search": (
        "--target_modules [input_layernorm]",
        "not a linear layer; name it in exclude_modules",
    ),
    "nothing to save": ("--modules_to_save [hed]", "modules_to_save=['hed']: 'hed' matches no"),
    "everything to save": ("--modules_to_save ['']", "modules_to_save=['']: must be a list of"),
    "a dropout of 1": ("--dropout 1", "dropout=1.0: must be below 1"),
    "a scaling of 0": ("--scaling 0", "scaling=0.0: must be a number > 0.0"),
    "another data type": ("--adapter_dtype flt", '"adapter_dtype": Expected a typing.Literal['),
    "no architecture step": ("--arch_every 0", "arch_every=0: must be an integer >= 1"),
    "more than all": ("--search_fraction 1.5", "search_fraction=1.5: must be above 0 and at"),
    "a seed above 32 bits": ("--seed 4294967296", "seed=4294967296: must be an integer <="),
    "no step": ("--max_steps 0", "max_steps=0: must be an integer > 0"),
    "steps above 64 bits": ("--max_steps 1" + 20 * "0", "must be an integer <="),
    "an empty batch": ("--batch_size 0", "batch_size=0: must be an integer > 0"),
    "a learning rate that is no number": ("--learning_rate nan", '"learning_rate": Expected a'),
    "an endless learning rate": ("--learning_rate 1e999", "learning_rate=inf: must be a number >"),
    "workers below 0": ("--num_workers -1", "num_workers=-1: must be an integer >= 0"),
    "another precision": ("--mixed_precision fp8", '"mixed_precision": Expected a typing.Literal'),
    "an unknown option": ("--batchsize 3", "unrecognized arguments: --batchsize 3"),
    "an option without a value": ("--batch_size", "--batch_size: expected one argument"),
    "an output that is a file": ("--output_dir {file}", "output_dir='{file}': cannot be written ("),
    "an output in a file": ("--output_dir {file}/x", "output_dir='{file}/x': cannot be written"),
    "nothing to resume": ("--resume --output_dir {folder}/new", "there is no checkpoint"),
    "no model": ("--model_name_or_path {folder}/none", "none': no local folder, no model of the"),
    "a folder without a model": ("--model_name_or_path {folder}", "give a hub name, a folder"),
    "no GGUF file": ("--gguf_file no.gguf", "cannot be loaded ("),
    "another type": ("--dtype float8", '"dtype": Expected a typing.Literal'),
    "a quantization of its own": ("--quantization 2bit", '"quantization": Does not validate'),
    "a generator to classify": ("--task classification", "row 0: needs the columns text and"),
    "no class": ("--num_labels 0", "num_labels=0: must be an integer > 0"),
    "no data set": ("--dataset {folder}/none", "dataset='{folder}/none': cannot be loaded ("),
    "no data file": ("--dataset json --data_files no.jsonl", "data_files: no such file:"),
    "no such split": ("--train_split dev", "train_split='dev': data set '"),
    "all rows for validation": (
        "--validation_fraction 0.999",
        "validation_fraction=0.999: leaves no sample in the training split (40 rows in all)",
    ),
    "a fraction above 1": ("--validation_fraction 2", "validation_fraction=2.0: must be between 0"),
    "no row": ("--max_train_samples 0", "max_train_samples=0: must be an integer > 0"),
    "rows that are too long": ("--max_length 3", "tokens, max_length=3; shorten or leave out the"),
    "more padding than tokens": (
        "--max_length 32 --pad_to_multiple_of 64",
        "pad_to_multiple_of=64: must be at most max_length=32",
    ),
}  # fmt: skip

# id: a configuration file of the search; what is told of it, after its name
CONFIGS = {
    "no option": ("batch_sise: 3", "the option 'batch_sise' is not known; nearest name"),
    "no YAML": ("{", "not a readable YAML file (while parsing a flow node"),
    "an empty file": ("", "must map option names to values, as config.yaml of a run does"),
    "a list": ("- 1", "must map option names to values"),
    "a number for a name": ("3: 1", "must map option names to values"),
    "an option twice": ("seed: 1\nseed: 2", "(the option 'seed' stands there twice)"),
    "an alias": ("seed: &a 1\nmax_steps: *a", "(the alias *a: write the value out)"),
    "lists without end": ("ranks: " + 9_999 * "[", "(lists or mappings more than 20 deep)"),
    "a Python object": ("seed: !!python/name:os.system", "not a readable YAML file (could not"),
    "a name that is nothing": ("?", "the name of an option must be text"),
    "a name that is a number": ("1e3:", "the name of an option must be text"),
    "another file": ("config: other.yaml", "the option 'config' is not known"),
    "no UTF-8": (b"seed: \xff", "not a readable YAML file ('utf-8' codec can't decode byte 0xff"),
    "a number of 5,000 digits": ("seed: " + 5_000 * "9", "not a readable YAML file (Exceeds the"),
    "a null character": ('output_dir: "a\\0b"', "output_dir='a\\x00b': cannot be written"),
    "a text for a number": ("seed: soon", "\"seed\": Expected a <class 'int'>. Got value: soon"),
    "two documents": ("seed: 1\n---\nseed: 2", "expected a single document in the stream"),
}  # fmt: skip

# id: the text of a genotype; what is told of it, after its name
GENOTYPES = {
    "nothing": ("", "cannot be read (Expecting value: line 1 column 1"),
    "cut off": (genotype()[:-9], "cannot be read ("),
    "a list": ("[1]", "holds a list, not a genotype"),
    "no module": ("{}", "ranks={}: must map module names to integers >= 0"),
    "a text for a rank": ('{"a": "4"}', "ranks={'a': '4'}: must map module names to integers"),
    "a rank below 0": ('{"a": -1}', "ranks={'a': -1}: must map module names to integers, 0 to"),
    "true for a rank": ('{"a": true}', "ranks={'a': True}: must map module names to integers"),
    "a rank of 30 digits": ('{"a": 1' + 29 * "0" + "}", "is too large a number"),
    "NaN": ('{"a": NaN}', "cannot be read (NaN is no JSON)"),
    "a module twice": ('{"a": 1, "a": 2}', "cannot be read (the key 'a' stands there twice)"),
    "a module twice, once with PEFT's prefix": (
        '{"a": 1, "base_model.model.a": 2}',
        "a module stands there with and without 'base_model.model.'",
    ),
    "lists without end": (100_000 * "[", "cannot be read (maximum recursion depth exceeded"),
    "no UTF-8": (b'{"\xff": 1}', "cannot be read ('utf-8' codec can't decode byte 0xff"),
    "a byte order mark": (b'\xef\xbb\xbf{"a": 1}', "cannot be read (Unexpected UTF-8 BOM"),
    "a name with a line end": ('{"a\\n": 1}', "must map dotted module names, no part empty, of at"),
    "an empty part of a name": ('{"a..b": 1}', "ranks={'a..b': 1}: must map dotted module names"),
    "half a character in a name": ('{"\\ud800": 1}', "must map dotted module names, no part empty"),
    "a name of 2,000 letters": (f'{{"{2_000 * "a"}": 1}}', "of at most 1000 printable characters"),
    "of a later release": (genotype(version=2), "version 2; this release reads 1"),
    "true for a version": (genotype(version=True), "version True; this release reads 1"),
    "no ranks": ('{"version": 1}', "ranks=None: must map module names to integers >= 0"),
    "an unknown field": (genotype(rank=1), "'rank' is not known; a genotype has ranks, scaling, "),
    "a scaling of 0": (genotype(scaling=0), "scaling=0: must be a number above 0"),
    "a text for a scaling": (genotype(scaling="x"), "scaling='x': must be a number above 0"),
    "shapes of others": (genotype(shapes={"b": [1, 2]}), "shapes={'b': [1, 2]}: must give 2"),
    "half a shape": (genotype(shapes={"a": [1], "b.c": [1, 2]}), "{'a': [1]}: must give 2 or 3"),
    "a shape of 0": (genotype(shapes={"a": [0, 4], "b.c": [1, 2]}), "shapes={'a': [0, 4]}: must"),
    "a rank above its layer": (
        genotype(ranks={"a": 9, "b.c": 0}),
        "ranks={'a': 9}: must be at most 8, the larger side of the layer",
    ),
    "candidates that fall": (genotype(candidates=[2, 0]), "candidates=[2, 0]: must be a list of"),
    "candidates that are none": (genotype(candidates=2), "ranks=2: candidate ranks must be"),
    "too few probabilities": (
        genotype(probabilities={"a": [1], "b.c": [0.5, 0.5]}),
        "probabilities={'a': [1]}: must give 2 numbers for every module of ranks, parts of 1",
    ),
    "probabilities above 1": (
        genotype(probabilities={"a": [3, -2], "b.c": [0.5, 0.5]}),
        "probabilities={'a': [3, -2]}: must give 2 numbers",
    ),
    "a text to save": (genotype(modules_to_save="a"), "modules_to_save='a': must be a list of"),
    "everything to save": (genotype(modules_to_save=[""]), "modules_to_save=['']: must be a list"),
    "a list for found_by": (genotype(found_by=[1]), "found_by=[1]: must be a mapping"),
    "a text for a budget": (
        genotype(found_by={"budget_parameters": "x"}),
        "budget_parameters='x': must be a number >= 0",
    ),
    "a number for a model": (genotype(base_model=3), "base_model=3: must be the name of a model"),
}  # fmt: skip

# id: options of derive on a good search; what is told
DERIVE = {
    "no search": ("--search_dir {folder}/none", "has no genotype.json; run accelerate launch"),
    "another method": ("--method best", '"method": Does not validate'),
    "two budgets": ("--budget_rank 1 --budget_parameters 9", "budget_parameters=9: give one of"),
    "a budget below 0": ("--budget_rank -1", "budget_rank=-1.0: must be a number > 0.0"),
    "a budget of 400 digits": (f"--budget_parameters 1{399 * '0'}", "must be an integer <= 92233"),
    "a budget above all": ("--budget_parameters 99", "99 parameters are outside what the"),
    "an output that is a folder": ("--output {folder}", "{folder}: cannot be written (Is a"),
}  # fmt: skip

FINETUNE = {
    "no genotype": ("--genotype no.json", "genotype='no.json': no such file; run `accelerate"),
    "neither genotype nor rank": ("--genotype null", "genotype=None: give a genotype, or a rank"),
    "a uniform rank of 0": ("--rank 0", "rank=0: must be an integer >= 1"),
    "a uniform rank that inherits": ("--rank 2 --init inherit", "init='inherit': a search leaves"),
    "another start": ("--init warm", '"init": Does not validate'),
    "a genotype of another model": ("", "2 of its 2 modules are no linear layers of the model,"),
}  # fmt: skip

EVALUATE = {
    "no adapter": ("--adapter {folder}/none", "no adapter_config.json there; run `accelerate"),
    "an empty batch": ("--eval_batch_size 0", "eval_batch_size=0: must be an integer >= 1"),
    "no new token": ("--max_new_tokens 0", "max_new_tokens=0: must be an integer >= 1"),
    "no test split": ("--test_split dev", "test_split='dev': data set"),
}  # fmt: skip

# id: what is changed of adapter_config.json; what is told
ADAPTERS = {
    "of another method": ({"peft_type": "NO_SUCH"}, "cannot be loaded into the model ("),
    "of no method": ({"peft_type": None}, "cannot be loaded into the model ("),
    "of another rank": ({"r": 3}, "cannot be loaded into the model ("),
    "of a rank that is none": ({"r": "two"}, "cannot be loaded into the model ("),
    "of layers that are not there": ({"target_modules": ["no"]}, "cannot be loaded into the model"),
    "of more layers than its weights": (
        {"target_modules": "all-linear"},
        "cannot be loaded into the model (Found missing adapter keys",
    ),
}  # fmt: skip

REPORT = {
    "no search": ("--search_dir {folder}/none", "search_dir='{folder}/none': no search's"),
    "finetunes that are no list": ("--finetune_dir 3", '"finetune_dir": Expected a <class'),
}  # fmt: skip

PRETRAIN = {
    "no step": ("--max_steps 0", "max_steps=0: must be an integer > 0"),
    "an empty batch": ("--batch_size 0", "batch_size=0: must be an integer > 0"),
    "a negative seed": ("--seed -1", "seed=-1: must be an integer >= 0"),
    "a learning rate of 0": ("--learning_rate 0", "learning_rate=0.0: must be a number > 0.0"),
    "an output that is a file": ("--output_dir {file}", "output_dir='{file}': cannot be written ("),
}  # fmt: skip


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """refused(recipe, arguments, told): it exits with status 2 and this one line."""
    (tmp_path / "file").write_text("")
    names = {"folder": str(tmp_path), "file": str(tmp_path / "file")}

    def check(recipe, arguments, told):
        for name, value in names.items():
            arguments = [part.replace(f"{{{name}}}", value) for part in arguments]
            told = told.replace(f"{{{name}}}", value)
        monkeypatch.setattr(sys, "argv", [f"recipes/{recipe}.py", *arguments])
        with pytest.raises(SystemExit) as status:
            runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")
        assert status.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        (start,) = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        listed = lines[start:]  # several bad rows are listed, each in a line of its own
        assert told in "\n".join(listed) and max(map(len, listed)) < 700
        return lines[start]

    return check


@pytest.fixture
def good(vision_folder, data_folder, tmp_path):
    """Options of a model and data that are there, and of a folder to write to."""
    return f"--model_name_or_path {vision_folder} --dataset {data_folder} --max_steps 2".split()


SMALL = ["--ranks", "[0,2]"]  # of the search: what the model's layers allow


@pytest.mark.parametrize("case", SEARCH)
def test_search(refused, good, tmp_path, case):
    given, told = SEARCH[case]
    output = ["--output_dir", str(tmp_path / "run")]
    refused("search", [*good, *SMALL, *output, *given.split()], told)
    assert not (tmp_path / "run" / "genotype.json").exists()


def file_of(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


@pytest.mark.parametrize("case", CONFIGS)
def test_configuration_files(refused, tmp_path, case):
    content, told = CONFIGS[case]
    path = file_of(tmp_path, "mine.yaml", content)
    line = refused("search", ["--config", path], told)
    assert path in line or "output_dir" in line


OWN = {"no option", "another file", "a null character"}


@pytest.mark.parametrize("case", [case for case in CONFIGS if case not in OWN])
def test_configurations_of_the_run_before(refused, tmp_path, case):
    """Which finetune reads as it reads its own; options that it does not have are passed over."""
    content, told = CONFIGS[case]
    if isinstance(content, str):
        content = content.replace("seed", "split_seed").replace("ranks", "max_steps")
    path = file_of(tmp_path, "config.yaml", content)
    options = ["--genotype", file_of(tmp_path, "genotype.json", genotype())]
    assert path in refused("finetune", options, told.replace("seed", "split_seed"))


@pytest.mark.parametrize("case", GENOTYPES)
def test_genotypes(refused, tmp_path, case):
    content, told = GENOTYPES[case]
    path = file_of(tmp_path, "genotype.json", content)
    line = refused("derive", ["--search_dir", str(tmp_path)], told)
    assert line.startswith(f"error: genotype {path!r}: ")


@pytest.mark.parametrize("case", DERIVE)
def test_derive(refused, tmp_path, case):
    given, told = DERIVE[case]
    file_of(tmp_path, "genotype.json", genotype(shapes={"a": [6, 4], "b.c": [6, 4]}))
    refused("derive", ["--search_dir", str(tmp_path), *given.split()], told)


@pytest.mark.parametrize("case", FINETUNE)
def test_finetune(refused, good, tmp_path, case):
    given, told = FINETUNE[case]
    path = file_of(tmp_path, "genotype.json", genotype())
    output = ["--output_dir", str(tmp_path / "run")]
    refused("finetune", ["--genotype", path, *good, *output, *given.split()], told)
    assert not (tmp_path / "run" / "adapter_config.json").exists()


@pytest.fixture(scope="module")
def adapter(vision_folder, tmp_path_factory):
    """The folder of an adapter of the small vision model."""
    folder = tmp_path_factory.mktemp("adapter")
    config = FinetuneConfig(None, rank=2, target_modules=["q_proj"])
    add_adapter(load_model(ModelConfig(vision_folder)), config, None).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", EVALUATE)
def test_evaluate(refused, good, adapter, case):
    given, told = EVALUATE[case]
    refused("evaluate", ["--adapter", str(adapter), *good[:4], *given.split()], told)


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(refused, good, adapter, tmp_path, case):
    changed, told = ADAPTERS[case]
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text()) | changed
    (folder / "adapter_config.json").write_text(json.dumps(config))
    line = refused("evaluate", ["--adapter", str(folder), *good[:4]], told)
    assert f"adapter={str(folder)!r}: " in line and line.endswith("that it was trained on?")


@pytest.mark.parametrize("case", REPORT)
def test_report(refused, case):
    given, told = REPORT[case]
    refused("report", given.split(), told)


@pytest.mark.parametrize("case", PRETRAIN)
def test_pretrain(refused, tmp_path, case):
    given, told = PRETRAIN[case]
    refused("pretrain_embedded", ["--output_dir", str(tmp_path / "run"), *given.split()], told)


def test_searched_weights_of_another_search(refused, good, vision_folder, tmp_path):
    """Cut off, of other names, of other shapes."""
    names = [n for n, _ in load_model(ModelConfig(vision_folder)).named_modules() if "q_proj" in n]
    found = Genotype(dict.fromkeys(names, 2), candidates=[0, 2])
    found.save(tmp_path / "genotype.json")
    options = ["--genotype", str(tmp_path / "genotype.json"), *good, "--init", "inherit"]
    options += ["--output_dir", str(tmp_path / "run")]
    weights = tmp_path / "supernet.safetensors"
    weights.write_bytes(b"\x00" * 9)
    refused("finetune", options, f"searched weights {str(weights)!r}: ")
    save_file(load_file(Path(vision_folder) / "model.safetensors"), weights)
    refused("finetune", options, f"genotype: module {names[0]!r} is not in the supernet")
