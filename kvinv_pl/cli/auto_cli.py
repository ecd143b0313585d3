"""The commands without a model: a function for each, whose signature and docstring are its options."""

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, get_origin

from kvinv_pl.cli.arguments import CommandLine, option_types, readable_errors, underscored
from kvinv_pl.cli.messages import without_null
from kvinv_pl.cli.utf8 import open_files_as_utf8
from kvinv_pl.cli.variant_names import expand_variant_names, make_importable
from kvinv_pl.errors import UserError

MODULES = {
    "world": "kvinv_pl.cli.commands.world",
    "mask": "kvinv_pl.cli.commands.mask",
    "new-variant": "kvinv_pl.cli.commands.new_variant",
    "variants": "kvinv_pl.cli.commands.variants",
    "sites": "kvinv_pl.cli.commands.variants",
    "methods": "kvinv_pl.cli.commands.methods",
    "bench": "kvinv_pl.cli.commands.bench",
    "ablate": "kvinv_pl.cli.commands.ablate",
    "completion": "kvinv_pl.cli.commands.completion",
    "report": "kvinv_pl.cli.commands.report",
    "studio": "kvinv_pl.cli.commands.studio",
    "check": "kvinv_pl.cli.commands.variants",
}
"""The module of each command, which is a function of that name; only the module in use is imported."""
POSITIONAL = {
    **{"mask": "image", "variants": "name", "methods": "name", "check": "target", "new-variant": "name"},
    **{"report": "folder", "completion": "shell"},
}
"""The option that a command's first positional argument stands for."""


def command(verb: str, argv: list[str]) -> None:
    """Run one command through jsonargparse."""
    from jsonargparse import ArgumentParser, auto_cli

    open_files_as_utf8()
    if verb == "sites":
        make_importable()
    function: Callable[..., None] = getattr(import_module(MODULES[verb]), verb.replace("-", "_"))

    class Parser(ArgumentParser):
        def format_help(self, *args: Any, **kwargs: Any) -> str:
            return _help(verb, super().format_help(*args, **kwargs))

    types = option_types({"": function})
    arguments = _normalized(
        verb, argv, {key: kind for key, kind in types.items() if get_origin(kind) is list}
    )
    line = CommandLine(expand_variant_names(arguments, "--attention"))
    line.read_rest(line.argv)
    with readable_errors(verb, line, types):
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
    """The help, with the positional argument as such in its usage."""
    usage, gap, rest = without_null(text).partition("\n\n")
    name = POSITIONAL.get(verb, "")
    return usage.replace(f"--{name} {name.upper()}", name.upper()) + gap + rest


def _normalized(verb: str, argv: Sequence[str], lists: Mapping[str, Any]) -> list[str]:
    """-o becomes --out, - in a name _, a positional argument its option, and a repeated option a list."""
    out, remaining, repeated = list[str](), deque(argv), dict[str, list[str]]()
    while remaining:
        flag, equals, value = underscored(remaining.popleft()).partition("=")
        if not flag.startswith("-"):
            option = f"--{POSITIONAL.get(verb)}="
            first = verb in POSITIONAL and not any(arg.startswith(option) for arg in out)
            out.append(f"{option if first else ''}{flag}{equals}{value}")
            continue
        is_alone = not remaining or remaining[0].startswith("--") or flag in ("-h", "--help")
        has_value = not equals and not is_alone
        if flag.removeprefix("--") in lists:
            if not (equals or has_value):
                got = remaining[0] if remaining else "nothing"
                raise UserError(f"{flag} expects a value, got {got}; see kvinv {verb} --help")
            repeated.setdefault(flag, []).append(remaining.popleft() if has_value else value)
        else:
            out.append(f"{'--out' if flag == '-o' else flag}{equals}{value}")
            out += [remaining.popleft()] if has_value else []
    for flag, values in repeated.items():  # as JSON
        texts = lists[flag[2:]] == list[str]
        out.append(f"{flag}={json.dumps(values) if texts else '[' + ', '.join(values) + ']'}")
    return out
