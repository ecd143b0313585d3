"""Whether a setting has the type and the range that it must have: from Python anything may come."""

import math
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from kvinv_pl.algorithm.method import require_shares
from kvinv_pl.errors import UserError

KINDS: dict[Any, tuple[str, Any]] = {
    bool: ("True or False", bool),
    int: ("a whole number", int),
    float: ("a number", (int, float)),
    str: ("a text", str),
    NoneType: ("None", NoneType),
}


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's, which a record can hold."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def require_kind(name: str, value: object, hint: Any) -> None:
    """Refuse a value of another kind than the annotation's; of those that are not known, any will do.

    Which text of a Literal it is, is checked where the value is used.
    """
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if any(get_origin(option) is Literal and isinstance(value, str) for option in options):
        return
    known = [
        KINDS.get(option, ("one of " + ", ".join(map(repr, get_args(option))), str)) for option in options
    ]
    fits = (isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for _, kind in known)
    if not any(fits):
        raise UserError(f"{name}: expected {' or '.join(text for text, _ in known)}, got {value!r}")


def at_least_0(name: str, value: float) -> None:
    """Refuse a setting that is no finite number of 0 or more."""
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{name}: expected a finite number of 0 or more, got {value}")


def above_0(name: str, value: float) -> None:
    """Refuse a factor that is no finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{name}: expected a finite number above 0, got {value}")


def share(name: str, value: float) -> None:
    """Refuse a share of the steps outside of 0 to 1."""
    require_shares(**{name: value})


def mean_squared_error(name: str, value: float) -> None:
    """Refuse an error below 0; infinity is one that everything is within."""
    if not value >= 0:
        raise UserError(f"{name}: expected a mean squared error of 0 or more, got {value}")


def at_least_1(name: str, count: int) -> None:
    """Refuse a count below 1."""
    if count < 1:
        raise UserError(f"{name}: expected 1 or more, got {count}")


def one_of(name: str, value: str, choices: Any) -> None:
    """Refuse a value that is not among the choices of a Literal."""
    known = get_args(choices)
    if value not in known:
        *but_last, last = known
        listed = ", ".join(known) if len(known) > 2 else f"{but_last[0]} or {last}"
        raise UserError(f"{name}: expected {listed}, got {value!r}")
