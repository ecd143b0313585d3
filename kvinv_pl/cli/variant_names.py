"""Names of variants on the command line and in YAML: short names become class paths."""

import os
import re
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

YAML = "yaml with variants"
"""The name under which jsonargparse knows the loader of `name_variants_in_yaml`."""


class InvalidYamlError(Exception):
    """The text is not valid YAML."""


def make_importable(configs: Sequence[str] = ()) -> None:
    """Load the registered variants, and import others from the working directory and the YAML's folder."""
    from kvinv_pl.attention.registry import load_all

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for file in map(Path, configs):
        if file.is_file() and (folder := str(file.resolve().parent)) not in sys.path:
            sys.path.append(folder)
    load_all()


def expand_variant_names(argv: Sequence[str], option: str) -> list[str]:
    """Replace the short name after `option`, as `kvinv variants` lists it, by its class path.

    Also after `option`.inner (the wrapped variant) and `option`.help.
    """
    named = re.compile(rf"{re.escape(option)}((\.init_args)?\.inner)*(\.help)?")
    out, remaining = list[str](), deque(argv)
    while remaining:
        arg = remaining.popleft()
        flag, equals, name = arg.partition("=")
        is_named = named.fullmatch(flag) is not None
        if is_named and not equals and remaining and not remaining[0].startswith("-"):
            name = remaining.popleft()
        elif not (is_named and equals):
            out.append(arg)
            continue
        out.append(f"{flag}={_class_path(name)}")
    return out


def name_variants_in_yaml() -> str:
    """Register a loader of YAML in which model.attention, and a class_path in it, may be a short name."""
    from jsonargparse import get_loader, set_loader

    plain = get_loader("yaml")

    def load(text: str) -> Any:
        try:
            value = plain(text)
        except Exception as error:
            raise InvalidYamlError(str(error)) from error
        model = value.get("model") if isinstance(value, dict) else None
        if isinstance(model, dict) and "attention" in model:
            model["attention"] = _expanded(model["attention"])
        return value

    set_loader(YAML, load, (InvalidYamlError,))
    return YAML


def _expanded(attention: Any) -> Any:
    """Replace short names by class paths in a variant's configuration, those of wrapped variants too."""
    if not isinstance(attention, dict):
        return _class_path(attention)
    inner = {
        key: _expanded(value) if isinstance(value, dict) or key == "inner" else value
        for key, value in attention.items()
    }
    return {**inner, "class_path": _class_path(inner["class_path"])} if "class_path" in inner else inner


def _class_path(name: Any) -> Any:
    """The class path of a short name; anything else, and null, unchanged."""
    if not isinstance(name, str) or not name.isidentifier() or name == "null":
        return name
    from kvinv_pl.attention.config import class_path
    from kvinv_pl.attention.registry import resolve

    return class_path(resolve(name))
