"""Whether a setting is of the kind that its annotation says: from Python anything may come."""

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

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
