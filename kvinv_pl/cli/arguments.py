"""Command-line arguments: short flags expanded to options, parser errors in one line."""

import inspect
import json
from argparse import ArgumentError
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from kvinv_pl.cli.messages import explain_parser_error
from kvinv_pl.cli.variant_names import expand_variant_names
from kvinv_pl.errors import UserError

SHORT_FLAGS = {
    "--image": ("data.image", "FILE"),
    "--source": ("data.source", "TEXT"),
    "--target": ("data.targets", "TEXT"),
    "--mask": ("data.mask", "FILE"),
    "--out": ("data.out", "DIR"),
    "--overwrite": ("data.overwrite", ""),
    "--checkpoint": ("model.checkpoint", "NAME"),
    "--steps": ("model.steps", "N"),
    "--guidance": ("model.guidance", "W"),
    "--start": ("model.start", "S"),
    "--reading": ("model.reading", "NAME"),
    "--seed": ("model.seed", "N"),
    "--negative": ("model.negative", "TEXT"),
}
"""Flags of every stage: the option that each stands for, whose help it has, and its metavar."""
IGNORED_FLAGS = {
    "invert": {"--guidance", "--start", "--reading", "--seed"},
    "edit": {"--seed"},
    "plan": {"--start", "--seed"},
}
"""Flags that a stage accepts but ignores: all stages share the same options."""
RUN_FLAG = ("data.run", "DIR")
SET_BY_RUN = {"data.source", "data.mask", "data.geometry", "data.out"}
"""What a run folder says for itself; not to be typed beside it, though a file may have it."""


@dataclass
class CommandLine:
    """A command line for the parser, and what the user typed for each option, by the option's full name."""

    argv: list[str]
    flags: Sequence[str] = ()
    configs: list[str] = field(default_factory=list)
    typed: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)

    def note(self, key: str, flag: str, value: str) -> None:
        """Record that this option was given, by this flag; raises UserError where two flags of it disagree.

        Of one flag that is repeated the last counts, as usual; but each --run brings its settings.
        """
        before = self.values.get(key, value)
        is_other = flag != self.typed.get(key, flag) or flag == "--run"
        if key != "config" and flag != "--target" and is_other and not _same(before, value):
            raise UserError(
                f"{self.typed[key]} {before} and {flag} {value} disagree: they are one option; give it once"
            )
        self.typed[key], self.values[key] = flag, value

    def read_rest(self, argv: Sequence[str]) -> None:
        """Record the options that are passed on unchanged."""
        for arg, following in zip(argv, [*argv[1:], ""], strict=False):
            if arg.startswith("-"):
                flag, equals, value = arg.partition("=")
                key = {"-c": "config", "-o": "out"}.get(flag, flag.lstrip("-"))
                self.note(key, flag, value if equals else following)


def underscored(arg: str) -> str:
    """`--seed-base=1` as `--seed_base=1`, the name that a parameter has; what is no flag stays as it is."""
    flag, equals, value = arg.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag.startswith("--") else arg


def _same(one: str, other: str) -> bool:
    """Whether two values say the same, as typed: 4 and 4, DIR and DIR/, true and True."""
    truths = {"true", "false"}
    return Path(one) == Path(other) or (one.lower() == other.lower() and one.lower() in truths)


def expand_short_flags(verb: str, argv: Sequence[str]) -> CommandLine:
    """Replace short flags by their options, and --run by the settings that the run was made with."""
    short = {**SHORT_FLAGS, **({"--run": RUN_FLAG} if verb == "edit" else {})}
    line, targets, remaining = CommandLine([], [*short]), list[str](), deque(argv)
    first, passed = list[str](), list[str]()  # YAML comes first, so that flags override it
    while remaining:
        arg = underscored(remaining.popleft())
        flag, equals, value = arg.partition("=")
        flag = {"-o": "--out", "-c": "--config"}.get(flag, flag)
        if flag not in short and flag != "--config":
            passed.append(arg)
            continue
        value = value if equals else _value_of(verb, flag, remaining)
        key = short[flag][0] if flag in short else "config"
        line.note(key, flag, value)
        if flag == "--target":
            targets.append(value)
        elif flag == "--run":
            from kvinv_pl.data.source_image import settings_of
            from kvinv_pl.stages.settings import IDLE

            folder = Path(value).expanduser()
            first[:0] = ["--config", json.dumps(settings_of(folder, IDLE))]
            line.argv.append(f"--{key}={folder}")  # a file's data.run would else have this run's settings
        elif flag == "--config":
            first += ["--config", value]
            line.configs.append(value)
        else:
            line.argv.append(f"--{key}={value}")
    line.read_rest(passed)
    if "data.run" in line.typed and (
        conflicting := {line.typed[key] for key in SET_BY_RUN & line.typed.keys()}
    ):
        raise UserError(
            f"{', '.join(sorted(conflicting))} cannot be combined with --run: the run folder has it; "
            "leave it out"
        )
    if targets:
        line.argv.append(f"--data.targets={json.dumps(targets, ensure_ascii=False)}")
    line.argv[:0] = [*first, *expand_variant_names(passed, "--model.attention")]
    return line


def _value_of(verb: str, flag: str, remaining: deque[str]) -> str:
    """The value after a flag; another flag is no value."""
    ours = ("--model.", "--data.", "--trainer.")
    following = remaining[0] if remaining else None
    flags = {*SHORT_FLAGS, "--run", "-o", "--config", "-c", "--help"}
    is_flag = following is not None and (following.partition("=")[0] in flags or following.startswith(ours))
    if flag == "--overwrite" and (following is None or following.startswith("-")):
        return "true"
    if following is None or is_flag:
        raise UserError(f"{flag} expects a value, got {following or 'nothing'}; see kvinv {verb} --help")
    return remaining.popleft()


def option_types(classes: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """The type of every option, by its full name."""
    types = dict[str, Any]()
    for prefix, cls in classes.items():
        for name, parameter in inspect.signature(cls).parameters.items():
            types[f"{prefix}{name}"] = kind = parameter.annotation
            if is_dataclass(kind) and isinstance(kind, type):
                types |= option_types({f"{prefix}{name}.": kind})
    return types


@contextmanager
def readable_errors(verb: str, line: CommandLine, types: Mapping[str, Any]) -> Iterator[None]:
    """Turn jsonargparse's errors into a UserError of one line."""
    try:
        yield
    except ArgumentError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            cause = cause.__cause__ or cause.__context__
        message = explain_parser_error(str(error), line.typed, types, line.values, line.flags)
        raise UserError(f"{message.rstrip(';. ')}; see kvinv {verb} --help") from error
