"""The command darts-lora: which recipe it runs, what it says of others; a silent import.
Not here: what a recipe does (tests/recipes)."""

import logging
import subprocess
import sys
import warnings

import pytest

from darts_lora import Genotype, cli
from darts_lora.base.options import load_config
from darts_lora.base.quiet import LINES, WARNINGS, hush
from darts_lora.cli.search import EMBEDDED_CONFIG


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["darts-lora", *map(str, args)])
    cli.main()


def test_a_command_is_the_recipe_of_that_name(tmp_path, monkeypatch, capsys):
    probabilities = {"a": [0.2, 0.8], "b": [0.9, 0.1]}
    found = Genotype(
        {"a": 4, "b": 0},
        shapes={"a": (8, 8), "b": (8, 8)},
        candidates=[0, 4],
        probabilities=probabilities,
    )
    found.save(tmp_path / "genotype.json")
    run(monkeypatch, "derive", "--search_dir", tmp_path, "--method", "argmax")
    assert Genotype.load(tmp_path / "genotype_argmax.json").ranks == {"a": 4, "b": 0}
    assert "Next: darts-lora finetune --genotype " in capsys.readouterr().out


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_without_a_command_all_are_told(args, monkeypatch, capsys):
    run(monkeypatch, *args)
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)


def test_an_unknown_command_is_an_error(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "serach")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: 'serach' is no command\nusage: darts-lora")


def test_the_embedded_default_lies_in_the_package():
    assert load_config(EMBEDDED_CONFIG)["dataset"] == "embedded"


@pytest.mark.parametrize("name", LINES)
def test_one_line_is_left_out_and_others_are_told(name, caplog):
    logger = logging.getLogger(name)
    with caplog.at_level(logging.WARNING, name):
        logger.warning(LINES[name] + " by this release", *["it"] * LINES[name].count("%s"))
        logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]


@pytest.mark.parametrize("start", WARNINGS)
def test_one_warning_is_left_out_and_others_are_told(start):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        hush()
        warnings.warn(f"{start} and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in told] == ["something else is deprecated"]


def test_the_package_is_imported_without_a_word():
    code = "import darts_lora, darts_lora.cli.search"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
