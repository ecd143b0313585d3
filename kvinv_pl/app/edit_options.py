"""The options of an edit as a user interface shows them, made of the fields of `EditSettings`."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from kvinv_pl.attention.registry import arguments
from kvinv_pl.errors import UserError
from kvinv_pl.stages.settings import EditSettings
from kvinv_pl.training.module import KVInversion

Kind = Literal["slider", "number", "whole number", "switch", "choice", "text"]


@dataclass(frozen=True)
class EditOption:
    """One setting of an edit, as a page shows it."""

    name: str
    kind: Kind
    help: str
    choices: tuple[str, ...] = ()
    range: tuple[float, float] | None = None
    """Of a slider."""
    default: Any = None
    """As KVInversion has it; None: left empty, it follows from something else."""

    @property
    def label(self) -> str:
        """Its name in words."""
        return self.name.replace("_", " ")

    @property
    def step(self) -> float:
        """By how much a slider moves at once."""
        low, high = self.range or (0.0, 1.0)
        return (high - low) / 20 if high - low <= 1 else 0.1 if high - low < 5 else 0.5

    def read(self, value: Any) -> Any:
        """What the page gives back, as the setting takes it; None: as loaded."""
        if value is None or (self.default is None and value == ""):
            return None
        return {"slider": float, "number": float, "whole number": int, "switch": bool}.get(self.kind, str)(
            value
        )

    def around(self, value: float) -> list[float]:
        """Some values to try, of which this is one."""
        low, high = self.range or (0.0, 1.0)
        tried = (value + (high - low) * k / 10 for k in (-1, 0, 1, 2))
        return sorted({round(min(max(each, low), high), 3) for each in tried})


def edit_options() -> list[EditOption]:
    """An option for every setting of an edit, in the order of the fields; those with a range come first."""
    texts, parameters = arguments(KVInversion.__doc__), inspect.signature(KVInversion).parameters
    found = list[EditOption]()
    for setting in fields(EditSettings):
        kind, choices = kind_of(setting.type)
        given = setting.metadata.get("range")
        shown = "slider" if given else kind
        name, default = setting.name, parameters[setting.name].default
        found.append(EditOption(name, shown, texts.get(name, ""), choices, given, default))
    return sorted(found, key=lambda option: option.range is None)


def kind_of(annotation: Any) -> tuple[Kind, tuple[str, ...]]:
    """How a setting of this type is shown, and what there is to choose from."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kind = next(option for option in options if option is not type(None))
    if get_origin(kind) is Literal:
        return "choice", get_args(kind)
    plain: dict[Any, Kind] = {bool: "switch", int: "whole number", float: "number"}
    return plain.get(kind, "text"), ()


def read(values: Sequence[Any]) -> dict[str, Any]:
    """The settings of an edit, from the values of its options in their order."""
    return {option.name: option.read(value) for option, value in zip(edit_options(), values, strict=True)}


def numbers(text: str) -> list[float]:
    """Numbers between commas."""
    try:
        return [float(number) for number in text.replace(";", ",").split(",") if number.strip()]
    except ValueError:
        raise UserError(f"values to try: expected numbers between commas, got {text!r}") from None
