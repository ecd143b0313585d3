"""The commands without a model: a function for each, whose signature and docstring are its options."""

import json
from collections import deque
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from kvinv_pl.cli.arguments import Line, in_words, kinds_of
from kvinv_pl.cli.variant_names import make_importable, spell_out
from kvinv_pl.errors import UserError

FILES = {
    "world": "kvinv_pl.cli.world",
    "mask": "kvinv_pl.cli.mask",
    "new-variant": "kvinv_pl.cli.new_variant",
    "variants": "kvinv_pl.cli.variants",
    "sites": "kvinv_pl.cli.variants",
    "check": "kvinv_pl.cli.variants",
}
"""Where each command is a function of its name; only the one that is given is imported."""
FIRST = {"mask": "image", "variants": "name", "check": "target", "new-variant": "name"}
"""What a command's first argument means, where it may stand without a name."""


def command(verb: str, argv: list[str]) -> None:
    """Run one command through jsonargparse."""
    from jsonargparse import ArgumentParser, auto_cli

    if verb == "sites":
        make_importable()
    function: Callable[..., None] = getattr(import_module(FILES[verb]), verb.replace("-", "_"))

    class Parser(ArgumentParser):
        def format_help(self, *args: Any, **kwargs: Any) -> str:
            return _help(verb, super().format_help(*args, **kwargs))

    kinds = kinds_of({"": function})
    spelled = _spelled_out(verb, argv, [key for key, kind in kinds.items() if kind == list[str]])
    line = Line(spell_out(spelled, "--attention"))
    line.read_rest(line.argv)
    with in_words(verb, line, kinds):
        auto_cli(
            function,
            args=line.argv,
            as_positional=False,
            prog=f"kvinv {verb}",
            exit_on_error=False,
            allow_abbrev=False,
            parser_class=Parser,
        )


def _help(verb: str, text: str) -> str:
    """The help, with a usage in which what may stand without a name does."""
    usage, gap, rest = text.partition("\n\n")
    name = FIRST.get(verb, "")
    return usage.replace(f"--{name} {name.upper()}", name.upper()) + gap + rest


def _spelled_out(verb: str, argv: Sequence[str], lists: Sequence[str]) -> list[str]:
    """-o as --out, a first argument without a name as what it means, and an option given often as a list."""
    out, left, several = list[str](), deque(argv), dict[str, list[str]]()
    while left:
        flag, equals, value = left.popleft().partition("=")
        if not flag.startswith("-"):
            unnamed = verb in FIRST and not any(arg.startswith(f"--{FIRST[verb]}=") for arg in out)
            out.append(f"{f'--{FIRST[verb]}=' if unnamed else ''}{flag}{equals}{value}")
            continue
        has_value = not equals and left and not left[0].startswith("--") and flag not in ("-h", "--help")
        if flag.removeprefix("--") in lists:
            if not (equals or has_value):
                got = left[0] if left else "nothing"
                raise UserError(f"{flag} expects a value, got {got}; see kvinv {verb} --help")
            several.setdefault(flag, []).append(left.popleft() if has_value else value)
        else:
            out.append(f"{'--out' if flag == '-o' else flag}{equals}{value}")
            out += [left.popleft()] if has_value else []
    return [*out, *(f"{flag}={json.dumps(values)}" for flag, values in several.items())]
