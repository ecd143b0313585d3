"""`kvinv completion`. The docstring is the help."""

import inspect
from argparse import ArgumentParser
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal, get_args, get_origin

import shtab

from kvinv_pl.attention.registry import arguments
from kvinv_pl.cli.arguments import IGNORED_FLAGS, RUN_FLAG, SHORT_FLAGS
from kvinv_pl.cli.auto_cli import MODULES, POSITIONAL
from kvinv_pl.cli.entry import COMMANDS, STAGES

FOLDER_OPTIONS = {"--out", "--run", "--folder"}
FILE_OPTIONS = {"--image", "--mask", "--config", "--checkpoint", "--model.vae", "--sam"}


def completion(shell: Literal["bash", "zsh", "tcsh"] = "bash") -> None:
    """Print a script with which a shell completes commands, options and their choices.

    Args:
        shell: Which shell; `kvinv completion SHELL` does as well.
    """
    print(shtab.complete(_parser(), shell))


def _parser() -> ArgumentParser:
    """A parser with every command and its options, for their names alone."""
    parser = ArgumentParser("kvinv")
    parser.add_argument("--version", action="store_true", help="the version")
    commands = parser.add_subparsers()
    options, texts = _of_stages()
    for verb, text in STAGES.items():
        command = commands.add_parser(verb, help=text)
        short = {**SHORT_FLAGS, **({"--run": RUN_FLAG} if verb == "edit" else {})}
        for flag in short.keys() - IGNORED_FLAGS.get(verb, set()):
            _add(command, flag, options[short[flag][0]], texts[short[flag][0]])
        _add(command, "--config", str, "options from a YAML file")
        for name, kind in options.items():
            _add(command, f"--{name}", kind, texts[name])
    for verb, text in COMMANDS.items():
        command = commands.add_parser(verb, help=text)
        function = getattr(import_module(MODULES[verb]), verb.replace("-", "_"))
        helps = arguments(function.__doc__)
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
            _add(command, f"--{name}", parameter.annotation, helps.get(name, ""))
        if POSITIONAL.get(verb) in ("image", "folder"):
            command.add_argument("first", nargs="?").complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    return parser


def _of_stages() -> tuple[dict[str, Any], Mapping[str, str]]:
    from kvinv_pl.training.datamodule import SourceImages
    from kvinv_pl.training.module import KVInversion
    from kvinv_pl.training.trainer import KVTrainer

    types, texts = dict[str, Any](), dict[str, str]()
    for section, cls in {"model": KVInversion, "data": SourceImages, "trainer": KVTrainer}.items():
        helps = arguments(cls.__doc__) | arguments(cls.__init__.__doc__)
        for name, parameter in inspect.signature(cls).parameters.items():
            types[f"{section}.{name}"], texts[f"{section}.{name}"] = parameter.annotation, helps.get(name, "")
    return types, texts


def _add(command: ArgumentParser, flag: str, kind: Any, text: str) -> None:
    literals = [option for option in (kind, *get_args(kind)) if get_origin(option) is Literal]
    choices = [choice for literal in literals for choice in get_args(literal)]
    if kind is bool:
        choices = ["true", "false"]
    first = text.partition(". ")[0].replace("%", "%%")
    option = command.add_argument(flag, help=first or None, choices=[str(each) for each in choices] or None)
    if flag in FOLDER_OPTIONS or flag in FILE_OPTIONS:
        option.complete = shtab.DIRECTORY if flag in FOLDER_OPTIONS else shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
