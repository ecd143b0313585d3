"""The registry of methods, which are found by their entry points."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint
from typing import Any, Literal

from kvinv_pl.attention.registry import distribution_of, entry_points_of, load_entry_point
from kvinv_pl.errors import UserError, near

GROUP = "kvinv_pl.methods"
Kind = Literal["inversion", "edit", "whole"]
KINDS: dict[str, Kind] = {"invert": "inversion", "control": "edit", "render": "whole"}
"""What a method is, by the name of the protocol's own function."""
UNSUPPORTED = {
    "elite": "beside weights of its own it needs CLIP ViT-L/14 and, of every picture, a mask of the object, "
    "which no bench hands to a method",
    "neaf": "of what its mixer is made and by which loss it learns is not known to us",
}
"""Methods that are asked for and have no file, and why; the table in docs/methods.md says more."""


@dataclass(frozen=True)
class Method:
    """One registered method: its class, or why it could not be imported."""

    name: str
    cls: type[Any] | None
    distribution: str
    error: str | None = None

    @property
    def kind(self) -> Kind | None:
        """Whether it is an inversion, an edit or a whole, to be used alone."""
        return next((kind for has, kind in KINDS.items() if hasattr(self.cls, has)), None)

    @property
    def text(self) -> str:
        """The docstring before its Args."""
        return inspect.cleandoc(self.cls.__doc__ or "").partition("\nArgs:")[0].strip() if self.cls else ""

    @property
    def options(self) -> dict[str, Any]:
        """What it can be made with, and the defaults, which are the published ones."""
        found = fields(self.cls) if self.cls is not None and is_dataclass(self.cls) else ()
        return {option.name: option.default for option in found}


def is_method(cls: type) -> bool:
    """Whether a class has one of the protocols' functions."""
    return any(hasattr(cls, has) for has in KINDS)


def methods() -> dict[str, Method]:
    """Every method in the entry-point group `kvinv_pl.methods`, by name; two of one name are an error."""
    return {point.name: _load(point) for point in entry_points_of(GROUP, "methods")}


def unknown_method(name: str, what: str, listed: Mapping[str, Method]) -> UserError:
    """No method has this name; of one that is missed, why it is not here."""
    if (why := UNSUPPORTED.get(name)) is not None:
        return UserError(
            f"{name} is not among the methods, since {why} (docs/methods.md has a table of such): "
            "leave it out, or give a method that `kvinv methods` lists"
        )
    shown = ", ".join(key for key, method in listed.items() if method.kind)
    return UserError(f"no {what} {name!r}: expected one of {shown}{near(name, list(listed))}")


def make(name: str, *kinds: Kind, **options: Any) -> Any:
    """The method of this name, if it is one of these kinds, with its published defaults but for `options`."""
    known = {key: method for key, method in methods().items() if method.kind in (*kinds, None)}
    if name not in known:
        raise unknown_method(name, " or ".join(kinds), known)
    method = known[name]
    if method.cls is None or method.kind is None:
        raise UserError(f"the method {name!r} of {method.distribution} is broken: {method.error}")
    if unknown := sorted(options.keys() - method.options.keys()):
        expected = ", ".join(method.options) or "none"
        raise UserError(f"{name} has no option {unknown[0]!r}: expected {expected}")
    return method.cls(**options)


def _load(point: EntryPoint) -> Method:
    cls, error = load_entry_point(point)
    if error is None and not (isinstance(cls, type) and is_method(cls)):
        cls, error = None, f"{point.value} has neither of {', '.join(KINDS)}"
    return Method(point.name, cls, distribution_of(point), error)
