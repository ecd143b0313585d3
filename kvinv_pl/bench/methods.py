"""The registry of methods, which are found by their entry points."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal

from kvinv_pl.attention.registry import Registered, load_group
from kvinv_pl.errors import UserError, near

GROUP = "kvinv_pl.methods"
Kind = Literal["inversion", "edit", "whole"]
KINDS: dict[str, Kind] = {"invert": "inversion", "control": "edit", "render": "whole"}
"""What a method is, by the name of the protocol's own function."""
UNSUPPORTED = {
    "neaf": "of what its mixer is made and by which loss it learns is not known to us",
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
