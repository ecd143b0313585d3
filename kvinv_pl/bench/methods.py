"""The registry of methods, which are found by their entry points."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kvinv_pl.attention.registry import Registered, load_group
from kvinv_pl.errors import UserError, near
from kvinv_pl.stages.validation import KINDS as VALUE_KINDS
from kvinv_pl.stages.validation import require_kind

GROUP = "kvinv_pl.methods"
Kind = Literal["inversion", "edit", "whole"]
KINDS: dict[str, Kind] = {"invert": "inversion", "control": "edit", "render": "whole"}
"""What a method is, by the name of the protocol's own function."""
UNSUPPORTED = {
    "neaf": "its paper's notes do not say how its mixer is built and by which loss it learns",
}
"""Methods that are asked for and have no file, and why; the table in docs/methods.md says more."""


class Method(Registered):
    """One registered method."""

    @property
    def kind(self) -> Kind | None:
        """Whether it is an inversion, an edit or a whole, to be used alone."""
        return next((kind for has, kind in KINDS.items() if hasattr(self.cls, has)), None)

    @property
    def options(self) -> dict[str, Any]:
        """What it can be made with, and the defaults, which are the published ones."""
        found = fields(self.cls) if self.cls is not None and is_dataclass(self.cls) else ()
        return {option.name: option.default for option in found}


@contextmanager
def loading(method: str, *options: str) -> Iterator[None]:
    """While a method loads what it needs beside the model: errors say by which options that is given."""
    try:
        yield
    except UserError as error:
        given = ", ".join(f'{option}="..."' for option in options)
        raise UserError(f"{error}; {method} takes it as {given}: see `kvinv methods {method}`") from error


def is_method(cls: type) -> bool:
    """Whether a class has one of the protocols' functions."""
    return any(hasattr(cls, has) for has in KINDS)


def methods() -> dict[str, Method]:
    """Every method in the entry-point group `kvinv_pl.methods`, by name; two of one name are an error."""
    return load_group(Method, GROUP, "methods", is_method, f"has neither of {', '.join(KINDS)}")


def unknown_method(name: str, what: str, known: Mapping[str, Method]) -> UserError:
    """No method has this name; of one that is missed, why it is not here."""
    if (why := UNSUPPORTED.get(name)) is not None:
        return UserError(
            f"{name} is not among the methods, since {why} (docs/methods.md has a table of such): "
            "leave it out, or give a method that `kvinv methods` lists"
        )
    shown = ", ".join(key for key, method in known.items() if method.kind)
    return UserError(f"no {what} {name!r}: expected one of {shown}{near(name, list(known))}")


def make(name: str, *kinds: Kind, **options: Any) -> Any:
    """The method of this name, with its published defaults but for `options`; of these kinds, or of any."""
    kinds = kinds or tuple(KINDS.values())
    known = {key: method for key, method in methods().items() if method.kind in (*kinds, None)}
    if name not in known:
        raise unknown_method(name, " or ".join(kinds), known)
    method = known[name]
    if method.cls is None or method.kind is None:
        raise UserError(f"the method {name!r} of {method.distribution} is broken: {method.error}")
    if unknown := sorted(options.keys() - method.options.keys()):
        expected = ", ".join(method.options) or "none"
        raise UserError(f"{name} has no option {unknown[0]!r}: expected {expected}")
    hints = get_type_hints(method.cls)
    for option, value in options.items():
        if _is_plain(hints.get(option)):
            require_kind(f"{name}: {option}", value, hints[option])
    return method.cls(**options)


def _is_plain(hint: Any) -> bool:
    """Whether an option is a number, a text, a truth value, None, or one of several texts."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return all(option in VALUE_KINDS or get_origin(option) is Literal for option in options)
