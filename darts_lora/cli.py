"""What the recipes share: the command line, the options of the run before, how errors are told.
Not here: what an option means (config.py), nor anything that knows a model or a data set."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from darts_lora.errors import InputError
from darts_lora.files import write_text

CONFIG_NAME = "config.yaml"


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

    The fields of all classes (dataclasses) become flat options, described by the docstrings under
    the fields; `main`'s docstring opens the help. An option's value is, first found: the one on
    the command line, the one in the file of `--config`, the one that the run before resolved
    (`shared` classes only), the default of the field.

    `previous` names the option of `own` that says where the run before left its result: a folder,
    or a file in it; that folder's config.yaml gives the values of the third kind, if it is there.

    `default_config` is the file of `--config` for a command line that names neither a config, a
    model nor a data set: the settings of the embedded default.

    An InputError, of parsing or out of `main`, is printed as one line, `error: ...`, by the main
    process; the exit status is then 2.
    """
    try:
        args = sys.argv[1:]
        named = {arg.split("=")[0] for arg in args}
        if default_config and not named & {"--config", "--model_name_or_path", "--dataset"}:
            args = ["--config", default_config, *args]
        main(*parse(args, own, *shared, previous=previous, description=main.__doc__))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gc.collect()  # what still holds the process group at the exit may abort it
            torch.distributed.destroy_process_group()
    except InputError as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def is_main_process() -> bool:
    """Whether this is the process that prints, of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def parse(
    args: list[str],
    own: type,
    *shared: type,
    previous: str | None = None,
    description: str | None = None,
) -> list[Any]:
    """One object of each class from the arguments; see `run`.

    Raises:
        InputError: an unknown option, a value of the wrong type or out of its bounds.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        default_env=False,
        exit_on_error=False,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE.yaml] [--option value ...]",
        description=description,
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of options; those after it win."
    )
    classes = (own, *shared)
    for config_class in classes:
        parser.add_class_arguments(config_class)
    args = _spell_out_flags(args, classes)
    try:
        values = parser.parse_args(args)
        if previous is not None:
            inherited = _inherited(getattr(values, previous), shared)
            parser.set_defaults(inherited)
            values = parser.parse_args(args)
    except (ArgumentError, TypeError) as error:
        raise InputError(" ".join(str(error).split())) from error
    return [c(**{f.name: values[f.name] for f in fields(c) if f.init}) for c in classes]


def _spell_out_flags(args: list[str], classes: tuple[type, ...]) -> list[str]:
    """`args` with "--resume" alone as "--resume=true", for every option that is true or false."""
    flags = {f"--{f.name}" for c in classes for f in fields(c) if f.type in (bool, "bool")}
    followers = [*args, "--"][1:]
    return [
        f"{arg}=true" if arg in flags and follower.startswith("--") else arg
        for arg, follower in zip(args, followers, strict=True)
    ]


def _inherited(result: str | None, classes: tuple[type, ...]) -> dict[str, Any]:
    """The options of `classes` in the config.yaml beside (or in) the result of the run before."""
    if result is None:
        return {}
    folder = result if os.path.isdir(result) else os.path.dirname(result)
    path = os.path.join(folder, CONFIG_NAME)
    if not os.path.isfile(path):
        return {}
    names = {f.name for c in classes for f in fields(c)}
    return {name: value for name, value in load_config(path).items() if name in names}


def load_config(path: str) -> dict[str, Any]:
    """The options in a YAML file, name to value.

    Raises:
        InputError: not a file, not YAML, or no mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            options = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable YAML file ({reason})") from error
    if not isinstance(options, dict):
        raise InputError(f"{path}: must map option names to values, as config.yaml of a run does")
    return options


def save_config(output_dir: str, *configs) -> str:
    """Write the resolved options (dataclass objects, flat) to config.yaml there; its path.

    Raises:
        InputError: it cannot be written.
    """
    options = {name: value for config in configs for name, value in asdict(config).items()}
    options = json.loads(json.dumps(options))  # tuples become lists: safe YAML knows no tuples
    path = os.path.join(output_dir, CONFIG_NAME)
    write_text(path, yaml.safe_dump(options, sort_keys=False))
    return path
