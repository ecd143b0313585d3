"""Error messages of the command line: those of jsonargparse, rewritten as one readable line."""

import re
from collections.abc import Callable, Collection, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from kvinv_pl.errors import near

LITERAL = re.compile(r"^typing\.Literal\[|\]$")
PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def describe_type(kind: Any) -> str:
    """A type in words."""
    origin, args = get_origin(kind), get_args(kind)
    if kind in PLAIN:
        return PLAIN[kind]
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin in (Union, UnionType):
        return " or ".join(describe_type(arg) for arg in args if arg is not NoneType)
    if origin is list:
        return f"a list of {'text' if args == (str,) else 'them'}"
    if isinstance(origin, type) and issubclass(origin, Callable):
        return f"the class_path of {_with_article(args[-1].__name__)}"
    return _with_article(getattr(kind, "__name__", str(kind)))


def without_null(text: str) -> str:
    """A help in which an option that may be left out is not said to be null then."""
    text = re.sub(r",\s+default:\s+null(?=[),])", "", text)
    return re.sub(r"(?:\s*\||,)\s*null(?=[\s\]}),])", "", text)


def explain_parser_error(
    message: str,
    typed: Mapping[str, str],
    types: Mapping[str, Any],
    values: Mapping[str, str],
    flags: Collection[str] = (),
) -> str:
    """Rewrite an error message of jsonargparse as one line; unknown messages are returned unchanged.

    Args:
        message: of jsonargparse.
        typed: how the user wrote each option, by its full name.
        types: every option's type, by its full name.
        values: what the user gave for each option, by its full name.
        flags: all short flags.
    """
    message = " ".join(message.split())
    if found := re.match(r'Parser key "([\w.]+)": (.*)', message):
        key, rest = found.groups()
        has_parts = not any(kind in tuple(PLAIN) for kind in (types.get(key), *get_args(types.get(key))))
        if not has_parts and (nested := re.search(r"NestedArg\(key='([\w.]+)'", rest)):
            other = f": did you mean --{nested[1]}" if nested[1] in types else ""
            return f"no option --{key}.{nested[1]}{other}"
        return f"{typed.get(key, key)}: {_value_error(rest, types.get(key), values.get(key))}"
    if found := re.match(r"[Uu]nrecognized arguments: (.*)", message):
        return _unknown_argument(found.group(1), [*flags, *(f"--{key}" for key in types)])
    if found := re.search(r"does not accept (?:nested )?(?:option|key) '?([\w.]+)", message):
        return f"no option {found.group(1)!r}{near(found.group(1), types)}"
    if found := re.match(r"(?:Problems parsing config|Unexpected config): (.*)", message):
        where = values.get("config", "the text given")
        return f"{where} is not a configuration: expected YAML with sections such as model and data"
    return message


def explain_setting_error(message: str, typed: Mapping[str, str], types: Mapping[str, Any]) -> str:
    """Replace a setting's name in an error such as "steps: expected 1 or more" by the flag that was typed.

    So is an option in "was made with", where a run has another setting.
    """
    if found := re.search(r" was made with (?:another )?([a-z_.]+)(?= = | \()", message):
        given = {key.replace(".init_args.", "."): flag for key, flag in typed.items()}
        for key in (f"{section}.{found[1]}" for section in ("model", "data")):
            if ".".join(key.split(".")[:2]) in types:
                return f"{message[: found.start(1)]}{given.get(key, f'--{key}')}{message[found.end(1) :]}"
    name, colon, rest = message.partition(": expected")
    given = [flag for key, flag in typed.items() if key.rpartition(".")[2] == name]
    return f"{given[0]}{colon}{rest}" if colon and given else message


def _value_error(message: str, kind: Any, value: str | None) -> str:
    if found := re.search(r"File does not exist: '?([^']*)'?", message):
        return f"there is no file {value or found.group(1)}"
    # an argument of a class that is given by class_path, where the innermost key is the one that is wrong
    inner = re.findall(r'Parser key "([\w.]+)": Expected an? (.+?)\. Got value: (.+?)(?:\.? |$)', message)
    if inner:
        key, wanted, got = inner[-1]
        return f"{key}: expected {LITERAL.sub('one of ', wanted)}, got {got.rstrip('.')!r}"
    if unknown := re.search(
        r"Option '([\w.]+)' is not accepted\. Got value: Namespace\(class_path='([\w.]+)'", message
    ):
        return f"{unknown.group(2)} takes no argument {unknown.group(1)!r}"
    found = re.search(r".*(?:Got|Given) value: (.*)$", message)
    if kind is None or not (found or value):
        return message
    return f"expected {describe_type(kind)}, got {value if value is not None else found and found.group(1)!r}"


def _unknown_argument(text: str, known: Collection[str]) -> str:
    """The error for an argument that belongs to no option."""
    word = text.split()[0]
    if not word.startswith("-"):
        return f"unexpected {text!r}: put text of several words in quotes"
    option = word.partition("=")[0]
    return f"no option {option}{near(option, known)}"


def _with_article(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"
