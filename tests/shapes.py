"""The type checker of the tests: beartype, where a signature states the shape of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

from beartype import beartype
from jaxtyping import AbstractArray

F = TypeVar("F", bound=Callable[..., Any])


def check(function: F) -> F:
    """Have beartype check `function`, if there is a shape to check.

    The rest is pyright's, and a test may hand over a wrong type to see what a user would be told. Of what a
    function returned, jaxtyping asks with the arguments once more, whose shapes it knows from the first time.
    """
    hints = getattr(function, "__annotations__", {})
    if hints.get("return", Any) is not Any:
        hints = function.__annotations__ = {"return": hints["return"]}
    return beartype(function) if any(map(states_a_shape, hints.values())) else function


def states_a_shape(hint: Any) -> bool:
    """Whether a type is a jaxtyping array, or made of one."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(states_a_shape, get_args(hint)))
