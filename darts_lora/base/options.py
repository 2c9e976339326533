"""What the recipes share: the command line, the options of the run before, how errors are told.
Not here: what an option means (config.py), nor anything that knows a model or a data set."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from typing import Any, get_args, get_type_hints

import torch
import yaml
from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    get_loader,
    set_loader,
    set_parsing_settings,
)
from tqdm import tqdm

from darts_lora.base.bounds import nearest
from darts_lora.base.errors import InputError, error_line, one_line, told_as
from darts_lora.base.files import is_main_process, write_text
from darts_lora.base.interruption import PeerLostError, Stopped, told_as_input_errors

CONFIG_NAME = "config.yaml"
MAX_DEPTH = 20  # of lists and mappings in a configuration: options have three
OTHERS_FIRST = 10.0  # seconds in which a launcher ends what is left of a run
RIGHTS = {"trust_remote_code": False}  # options that permit something -> the value that does not


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that look like numbers to jsonargparse, not only to PyYAML: '1e3'."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+.0-9][-+._0-9eE]*$"), list("-+.0123456789")
)


def run(
    main: Callable,
    own: type,
    *shared: type,
    previous: str | None = None,
    default_config: str | None = None,
) -> None:
    """Parse the command line and call `main` with one object of each class. A whole recipe:

        def main(options: FinetuneConfig, model: ModelConfig, training: TrainingConfig):
            save_config(options.output_dir, options, model, training)
            ...

        if __name__ == "__main__":
            run(main, FinetuneConfig, ModelConfig, TrainingConfig, previous="genotype")

    The fields of all classes (dataclasses with defaults) become flat options, described by the
    docstrings under the fields; `main`'s docstring opens the help. An option's value is, first
    found: the one on the command line, the one in the file of `--config`, the one that the run
    before resolved (`shared` classes only), the default of the field.

    `previous` names the option of `own` that says where the run before left its result: a folder,
    or a file in it; that folder's config.yaml gives the values of the third kind, if it is there.
    It may be of a folder that was downloaded, so it grants no rights: where it does, the user must
    say so too.

    `default_config` is the file of `--config` for a command line that names neither a config, a
    model nor a data set: the settings of the embedded default.

    An InputError, of parsing or out of `main`, is printed as one line, `error: ...`, by the process
    that met it; by one alone, where all did. The exit status is then 2. So is a lack of memory,
    wherever it shows. A run that was stopped (interruption.py) has its own status, and one that was
    interrupted outside of its loop 130.
    """
    status: int | str | None = 0
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # terminals that lack a character show another
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    threading.excepthook = _thread_failed
    try:
        args = sys.argv[1:]
        named = {arg.split("=")[0] for arg in args}
        about: dict[str, Any] = {"description": main.__doc__}
        if named & {"--help", "-h"}:
            about["epilog"] = _in_force(previous, default_config)
        elif default_config and not named & {"--config", "--model_name_or_path", "--dataset"}:
            args = ["--config", default_config, *args]
        with told_as_input_errors():
            main(*parse(args, own, *shared, previous=previous, **about))
    except Stopped as stopped:
        status = stopped.code
    except KeyboardInterrupt:
        _tell("SIGINT: ended before its end" if is_main_process() else "")
        sys.exit(128 + signal.SIGINT)
    except InputError as error:
        if not is_main_process() or isinstance(error, PeerLostError):
            # Where the first process met the same, it says so, and the launcher ends this one.
            time.sleep(OTHERS_FIRST)
        _tell(error_line(error))
        sys.exit(2)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # what still holds the process group at the exit may abort it
        torch.distributed.destroy_process_group()
    if status:
        sys.exit(status)


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """Nothing is printed of a thread that keeps its error for whoever asks it (TensorBoard's)."""
    if getattr(failed.thread, "exception", None) is not failed.exc_value:
        threading.__excepthook__(failed)


def _tell(line: str) -> None:
    """Print the last line of a run, on a line of its own."""
    if hasattr(signal, "SIGCHLD"):  # data workers that end now are no news
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for bar in list(tqdm._instances):
        bar.close()
    if line:
        print(line, file=sys.stderr, flush=True)


def parse(
    args: list[str],
    own: type,
    *shared: type,
    previous: str | None = None,
    **about: Any,
) -> list[Any]:
    """One object of each class from the arguments; see `run`. `about`: the help's description and
    epilog.

    Raises:
        InputError: an unknown option, a value of the wrong type or out of its bounds.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("strict_yaml", _load_yaml, (yaml.YAMLError,))
    parser = ArgumentParser(
        parser_mode="strict_yaml",
        default_env=False,
        exit_on_error=False,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE.yaml] [--option value ...]",
        **about,
    )
    parser.add_argument("--config", help="YAML file of options; the command line wins.")
    classes = (own, *shared)
    for config_class in classes:
        parser.add_class_arguments(config_class)
    try:
        args = _spell_out_flags(args, classes)
        named = vars(parser.parse_args(args, defaults=False))
        path = named.pop("config", None)
        given = {} if path is None else _read_options(parser, path, classes)
        values = _values(parser, args, given, named)
        beside = None if previous is None else _config_beside(values[previous])
        if beside is not None:
            inherited = _read_options(parser, beside, shared, others=True)
            new = {name: v for name, v in inherited.items() if name not in {*given, *named}}
            _refuse_rights(new, values[previous])
            values = _values(parser, args, inherited | given, named)
            if is_main_process() and new:
                print(f"Options that are not given are those of {beside}", flush=True)
    except (ArgumentError, TypeError, ValueError, RecursionError) as error:
        raise error if isinstance(error, InputError) else InputError(one_line(error)) from error
    return [c(**{f.name: values[f.name] for f in fields(c) if f.init}) for c in classes]


def _in_force(previous: str | None, default_config: str | None) -> str | None:
    """What the help says of options that are in force in place of the defaults that it shows."""
    if previous is not None:
        return (
            f"Of model, data and training the options in the config.yaml beside --{previous} are "
            "in force, where it is there, in place of the defaults above."
        )
    if default_config is None:
        return None
    options = ", ".join(f"{n}: {v}" for n, v in load_config(default_config).items())
    return (
        "Without --config, --model_name_or_path and --dataset the options of "
        f"{os.path.relpath(default_config)} are in force in place of the defaults above: {options}"
    )


def _read_options(
    parser: ArgumentParser, path: str, classes: tuple[type, ...], others: bool = False
) -> dict[str, Any]:
    """The options of `classes` in a file, checked as those of the command line are; where `others`
    may stand there too, these are left out."""
    hints = {name: hint for c in classes for name, hint in get_type_hints(c).items()}
    options = load_config(path)
    if others:
        options = {name: value for name, value in options.items() if name in hints}
    for name in options:
        if name not in hints:
            raise InputError(f"{path}: the option {name!r:.100} is not known{nearest(name, hints)}")
    with told_as(f"{path}: has a bad value", ArgumentError, TypeError, ValueError):
        checked = vars(parser.parse_object(options, defaults=False))
    # jsonargparse reads the strings of a file as YAML once more: '~' would come back as None
    return checked | {
        name: value
        for name, value in options.items()
        if isinstance(value, str) and str in (hints[name], *get_args(hints[name]))
    }


def _values(
    parser: ArgumentParser, args: list[str], given: dict[str, Any], named: Iterable[str]
) -> dict[str, Any]:
    """Each option's value: of the command line, which may add to a list or mapping of a file; else
    as `given` by a file, else the default."""
    parser.set_defaults(given)
    values = vars(parser.parse_args(args))
    return values | {name: value for name, value in given.items() if name not in named}


def _spell_out_flags(args: list[str], classes: tuple[type, ...]) -> list[str]:
    """`args` with "--resume" alone as "--resume=true", for every option that is true or false."""
    flags = {f"--{f.name}" for c in classes for f in fields(c) if f.type in (bool, "bool")}
    followers = [*args, "--"][1:]
    return [
        f"{arg}=true" if arg in flags and follower.startswith("--") else arg
        for arg, follower in zip(args, followers, strict=True)
    ]


def _config_beside(result: str | None) -> str | None:
    """The config.yaml beside (or in) a result, if it is there."""
    if result is None:
        return None
    folder = result if os.path.isdir(result) else os.path.dirname(result)
    path = os.path.join(folder, CONFIG_NAME)
    return path if os.path.isfile(path) else None


def _refuse_rights(inherited: dict[str, Any], source: str) -> None:
    """Raises InputError where the run before would grant a right that the user did not."""
    for name, harmless in RIGHTS.items():
        if inherited.get(name, harmless) != harmless:
            raise InputError(
                f"{name}: the config.yaml of {source!r} has {inherited[name]!r}, which only you "
                f"may grant; add --{name} if you trust the model's code, or --{name} "
                f"{str(harmless).lower()}"
            )


def command(recipe: str, *configs, **options: str) -> str:
    """A command to copy, of the kind that runs now: the recipe with these options, each value as
    one word of the shell, and the flags of the rights that `configs` (dataclass objects) have: a
    run inherits none of them."""
    values = {name: value for config in configs for name, value in asdict(config).items()}
    granted = [n for n, harmless in RIGHTS.items() if values.get(n, harmless) != harmless]
    words = [f"--{name} {shlex.quote(value)}" for name, value in options.items()]
    words += [f"--{name}" for name in granted]
    start = f"accelerate launch recipes/{recipe}.py"
    if sys.argv[0].startswith("darts-lora "):
        start = f"darts-lora {recipe}"
    return " ".join([start, *words])


def load_config(path: str) -> dict[str, Any]:
    """The options in a YAML file, name to value.

    Raises:
        InputError: not a file, not YAML, no mapping of names; an alias, a key that stands there
            twice, or lists in lists without end.
    """
    unreadable = told_as(f"{path}: not a readable YAML file", OSError, ValueError, yaml.YAMLError)
    with unreadable, open(path, encoding="utf-8-sig") as file:
        options = _load_yaml(file.read())
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise InputError(f"{path}: must map option names to values, as config.yaml of a run does")
    return options


def _load_yaml(text: str) -> Any:
    """YAML, without what no configuration needs: aliases grow without bound when they are written
    out, deep nesting exhausts the stack, and of a key that stands there twice the first is lost."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"the alias *{event.anchor}: write the value out")
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"lists or mappings more than {MAX_DEPTH} deep")
    nodes = [yaml.compose(text, Loader=yaml.SafeLoader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key, count in Counter(keys).items() if count > 1]:
                raise yaml.YAMLError(f"the option {twice[0]!r:.100} stands there twice")
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
    try:
        return get_loader("yaml")(text)  # which reads 1e-4 as a number
    except TypeError as error:  # its own, at a single key without a value
        raise yaml.YAMLError("the name of an option must be text") from error


def save_config(output_dir: str, *configs) -> str:
    """Write the resolved options (dataclass objects, flat) to config.yaml there; its path.

    Raises:
        InputError: it cannot be written, or not read again.
    """
    options = {name: value for config in configs for name, value in asdict(config).items()}
    options = json.loads(json.dumps(options))  # tuples become lists: safe YAML knows no tuples
    for name, value in options.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name}={value!r:.200}: must be text in UTF-8") from error
    path = os.path.join(output_dir, CONFIG_NAME)
    write_text(path, yaml.dump(options, Dumper=_Dumper, sort_keys=False))
    return path
