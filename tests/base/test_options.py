"""The command line of the recipes: where a value comes from, and how bad ones are told.
Not here: bounds of single options (test_config.py), nor the recipes themselves (recipes/)."""

import io
import re
import shlex
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from tqdm import tqdm

from darts_lora.base.errors import InputError
from darts_lora.base.interruption import PeerLostError
from darts_lora.base.options import command, load_config, parse, run, save_config
from darts_lora.config import DataConfig, ModelConfig, SearchConfig, TrainingConfig


@dataclass
class Own:
    """What this recipe does."""

    source: str = "runs/none/result.json"
    """File that the run before left."""
    seed: int = 0
    """Seed of everything."""


@dataclass
class Folder:
    """Options of a recipe that has no seed of its own."""

    folder: str = "runs/none"
    """Folder of the run before."""


@dataclass
class Defaulted:
    """Options of a recipe with defaults only."""

    number: int = 1
    """Some number."""
    flag: bool = False
    """Something to switch on."""


@dataclass
class Texts:
    """Options of every type that takes text."""

    text: str = "default"
    """Text."""
    optional: str | None = "default"
    """Text or nothing."""
    one_or_several: str | list[str] | None = None
    """Texts."""
    several: list[str] | None = None
    """Texts."""
    mapping: str | list[str] | dict[str, str | list[str]] | None = None
    """Texts by name."""


@pytest.fixture
def previous(tmp_path):
    """The result file of a run whose config.yaml resolved these options."""
    (tmp_path / "config.yaml").write_text(
        "learning_rate: 0.5\nbatch_size: 7\nmax_steps: 9\nseed: 3\nunknown: 1\n"
    )
    return str(tmp_path / "result.json")


def test_a_value_is_of_the_command_line_then_the_file_then_the_run_before(tmp_path, previous):
    config = tmp_path / "mine.yaml"
    config.write_text("learning_rate: 1e-4\nbatch_size: 8\n")
    args = ["--source", previous, "--config", str(config), "--batch_size", "2"]
    own, training = parse(args, Own, TrainingConfig, previous="source")
    assert (training.batch_size, training.learning_rate, training.max_steps) == (2, 1e-4, 9)
    assert training.logging_steps == TrainingConfig().logging_steps
    assert own.seed == 0, "the recipe's own options are not those of the run before"


def test_the_run_before_may_be_named_by_its_folder_or_be_missing(tmp_path, previous):
    _, training = parse(["--source", str(tmp_path)], Own, TrainingConfig, previous="source")
    assert training.batch_size == 7
    _, training = parse([], Own, TrainingConfig, previous="source")
    assert training == TrainingConfig()


@pytest.mark.parametrize("written", ["true", "yes", "'true'"])
def test_a_right_is_not_inherited_from_the_run_before(tmp_path, written):
    (tmp_path / "config.yaml").write_text(f"trust_remote_code: {written}\n")
    before = ["--folder", str(tmp_path)]
    with pytest.raises(InputError, match="trust_remote_code"):
        parse(before, Folder, ModelConfig, previous="folder")
    _, model = parse([*before, "--trust_remote_code"], Folder, ModelConfig, previous="folder")
    assert model.trust_remote_code, "the user's own word grants it"
    _, model = parse(
        [*before, "--trust_remote_code", "false"], Folder, ModelConfig, previous="folder"
    )
    assert not model.trust_remote_code
    own = tmp_path / "own.yaml"
    own.write_text("trust_remote_code: true\n")
    _, model = parse([*before, "--config", str(own)], Folder, ModelConfig, previous="folder")
    assert model.trust_remote_code and command("x", model).endswith("x.py --trust_remote_code")
    assert command("x", ModelConfig()).endswith("x.py")


def test_a_lack_of_memory_is_told_in_one_line_wherever_it_shows(monkeypatch, capsys):
    def main(options):
        """Load what is too large."""
        raise torch.OutOfMemoryError("CUDA out of memory.\nGPU 0 has")

    monkeypatch.setattr(sys, "argv", ["recipe"])
    with pytest.raises(SystemExit) as stopped:
        run(main, Defaulted)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: out of memory (CUDA out of memory. ")
    assert line.endswith("or quantization")


def test_saved_options_come_back(tmp_path):
    saved = [
        SearchConfig(ranks=(1, 3), target_modules=["q_proj"], search_fraction=0.2),
        DataConfig(data_files={"train": "a.json"}, test_split=None),
    ]
    path = save_config(str(tmp_path), *saved)
    assert load_config(path)["ranks"] == [1, 3]
    args = ["--folder", str(tmp_path)]
    _, *again = parse(args, Folder, SearchConfig, DataConfig, previous="folder")
    assert again == saved
    _, *again = parse(["--config", path], Defaulted, SearchConfig, DataConfig)
    assert again == saved


# null, boolean, numbers (1e3 and ._ to jsonargparse alone), date, list, mapping, quotes, anchor,
# alias, tag, comment, document, block, nothing
YAML_TEXTS = ["null", "~", "true", "1", "0x1f", "1e3", "1.5e3", "._", ".inf", "2020-01-01", "[a]"]
YAML_TEXTS += ["- a", "-", "a: b", "{a: b}", "? a", '"x"', "'x'", "&0", "*x", "!!str x", "# x"]
YAML_TEXTS += ["---", "|", "[", "", " ", "a\nb", "\x85", "\x00", "default"]


@pytest.mark.parametrize("text", YAML_TEXTS)
def test_saved_text_that_is_yaml_itself_comes_back(tmp_path, text):
    for saved in (
        Texts(text, text, text, [text], text),
        Texts(text, None, [text, text], [text, text], [text]),
        Texts(mapping={"train": text, "test": [text]}),
        Texts(mapping={text: text}),
    ):
        path = save_config(str(tmp_path), saved)
        assert parse(["--config", path], Texts) == [saved]
        _, again = parse(["--folder", str(tmp_path)], Folder, Texts, previous="folder")
        assert again == saved


def test_the_command_line_is_yaml_and_wins_over_text_of_a_file(tmp_path):
    path = save_config(str(tmp_path), Texts("~", "~", "[a]", ["~"], {"train": "~"}))
    args = ["--config", path, "--text", "null", "--optional", "null", "--one_or_several=[b]"]
    args += ["--several+", "c", "--mapping.test", "d"]
    expected = Texts("null", None, ["b"], ["~", "c"], {"train": "~", "test": "d"})
    assert parse(args, Texts) == [expected]


@pytest.mark.parametrize("value", ["a\udcff", ["a\udcff"], {"a\udcff": "a"}])
def test_text_that_no_file_can_hold_is_not_saved(tmp_path, value):
    with pytest.raises(InputError, match=r"^mapping=.*: must be text in UTF-8$"):
        save_config(str(tmp_path), Texts(mapping=value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], False),
        (["--flag"], True),
        (["--flag", "--number", "3"], True),
        (["--flag", "false"], False),
        (["--flag=true"], True),
    ],
)
def test_an_option_that_is_true_or_false_needs_no_value(args, expected):
    (own,) = parse(args, Defaulted)
    assert own.flag is expected


@pytest.mark.parametrize(
    ("args", "used"),
    [
        ([], True),
        (["--number", "3"], True),
        (["--dataset", "mine"], False),
        (["--model_name_or_path=mine"], False),
        (["--config", "other.yaml"], False),
    ],
)
def test_the_default_config_is_for_the_embedded_default_alone(monkeypatch, tmp_path, args, used):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded.yaml").write_text("split_seed: 7\nnumber: 2\n")
    (tmp_path / "other.yaml").write_text("split_seed: 1\n")
    seen = []
    monkeypatch.setattr(sys, "argv", ["recipe.py", *args])
    run(
        lambda *configs: seen.extend(configs),
        Defaulted, ModelConfig, DataConfig, default_config="embedded.yaml",
    )  # fmt: skip
    assert (seen[2].split_seed == 7) == used
    assert not used or seen[0].number == (3 if args else 2), "the command line wins"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--foo", "1"], "unrecognized arguments: --foo 1"),
        (["--batch", "1"], "unrecognized arguments: --batch 1"),
        (["--batch_size"], "--batch_size: expected one argument"),
        (["--learning_rate", "nan"], '"learning_rate": Expected a'),
        (
            ["--config", "unknown.yaml"],
            "unknown.yaml: the option 'batch_sise' is not known; nearest name: batch_size",
        ),
        (["--config", "broken.yaml"], "broken.yaml: not a readable YAML file (while parsing"),
        (["--batch_size", "x"], "\"batch_size\": Expected a <class 'int'>. Got value: x"),
        (["--batch_size", "0"], "batch_size=0: must be an integer > 0"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: not a readable YAML file (No"),
    ],
)
def test_bad_arguments(monkeypatch, tmp_path, args, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unknown.yaml").write_text("batch_sise: 3\n")
    (tmp_path / "broken.yaml").write_text("{")
    with pytest.raises(InputError) as error:
        parse(args, Own, TrainingConfig)
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "- 1\n", "3"])
def test_a_broken_config_of_the_run_before(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"config\.yaml: "):
        parse(["--source", str(tmp_path)], Own, TrainingConfig, previous="source")


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("kind", [InputError, PeerLostError])
def test_an_error_is_one_line_and_status_2_of_the_process_that_met_it(
    monkeypatch, capsys, rank, kind
):
    """What all processes meet, the first one says at once, and the launcher ends the others while
    they wait; what another one met alone, it says itself."""

    def main(own):
        raise kind("it is not there")

    waited = []
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(SystemExit) as status:
        run(main, Own)
    assert status.value.code == 2
    assert capsys.readouterr().err == "error: it is not there\n"
    assert bool(waited) == (rank == "1" or kind is PeerLostError)


def test_what_a_file_says_cannot_make_a_second_line_or_move_the_cursor(monkeypatch, capsys):
    def main(own):
        raise InputError("x\nerror: all is well\x1b[2J\u202e\u2028" + "y" * 10**6 + "; lower it")

    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    with pytest.raises(SystemExit):
        run(main, Own)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: x\\nerror: all is well\\x1b[2J\\u202e\\u2028yyy")
    assert len(line) < 2100 and line.endswith("yyy; lower it")


def test_an_error_stands_on_a_line_of_its_own_behind_a_bar(monkeypatch, capsys):
    def main(own):
        bar = tqdm(total=8, file=sys.stderr)
        bar.update(4)
        raise InputError("the disk is full")

    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    with pytest.raises(SystemExit):
        run(main, Own)
    assert capsys.readouterr().err.endswith("\nerror: the disk is full\n")


def test_an_interrupt_outside_of_a_loop_is_one_line_and_status_130(monkeypatch, capsys):
    def main(own):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    with pytest.raises(SystemExit) as status:
        run(main, Own)
    assert status.value.code == 130
    assert capsys.readouterr().err == "SIGINT: ended before its end\n"


def test_a_terminal_without_a_character_shows_another(monkeypatch):
    def main(own):
        print("a▁b\udcff")
        raise InputError("c▁d\udcff")

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as status:
        run(main, Own)
    out.flush()
    assert status.value.code == 2 and out.buffer.getvalue() == b"a?b?\n"
    assert err.buffer.getvalue() == b"error: c\\u2581d\\udcff\n"


def test_help_shows_every_option_with_its_default(monkeypatch, capsys):
    def main(own, training):
        """What the recipe is for."""

    monkeypatch.setattr(sys, "argv", ["recipe.py", "--help"])
    with pytest.raises(SystemExit) as status:
        run(main, Own, TrainingConfig)
    text = " ".join(capsys.readouterr().out.split())
    assert status.value.code == 0
    for part in ("What the recipe is for.", "File that the run before left.", "default: 1000"):
        assert part in text
    for name in TrainingConfig.__dataclass_fields__:
        assert f"--{name} " in text


@pytest.mark.parametrize("path", ["runs/a", "my run/a", "it's", "$HOME/`x`", "a;b"])
def test_a_printed_command_is_made_of_whole_words(path):
    words = shlex.split(command("finetune", ModelConfig(trust_remote_code=True), genotype=path))
    assert words[:3] == ["accelerate", "launch", "recipes/finetune.py"]
    assert words[3:] == ["--genotype", path, "--trust_remote_code"]


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["--dataset", "mine", "--help"]])
def test_help_says_which_options_are_in_force_in_place_of_its_defaults(
    monkeypatch, tmp_path, capsys, args
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded.yaml").write_text("split_seed: 7\n")
    monkeypatch.setattr(sys, "argv", ["recipe.py", *args])
    for options, wanted in (
        ({"default_config": "embedded.yaml"}, "embedded.yaml are in force .*: split_seed: 7"),
        ({"previous": "folder"}, "the options in the config.yaml beside --folder are in force"),
    ):
        with pytest.raises(SystemExit):
            run(lambda *_: None, Folder, DataConfig, **options)
        text = " ".join(capsys.readouterr().out.split())
        assert re.search(wanted, text)
        shown = re.search(r"Seed of the split .*?\(type: int, default: (\d+)\)", text)
        assert shown[1] == "0", "the field's own"
