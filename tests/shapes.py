"""The type checker of the tests: beartype, where a signature states the shape of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial, wraps
from typing import Any, TypeVar, get_args

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray

F = TypeVar("F", bound=Callable[..., Any])

CALLS = 8
"""Calls of one function that are checked in one test: every site of the tiny U-Nets, and more."""
_every_call = jaxtyping.jaxtyped
_calls = dict[str, int]()
_without = set[str]()
"""Functions that state no shape: one that is defined in another is met whenever that is called."""


def new_test() -> None:
    """Begin to count the calls anew."""
    _calls.clear()


def jaxtyped(function: Any = None, *, typechecker: Callable[[F], F]) -> Any:
    """As jaxtyping's, for the first calls in each test, where a shape is stated; the rest go by unwrapped.

    To bind the arguments of every call takes as long as much of what the tiny networks compute.
    """
    if function is None:
        return partial(jaxtyped, typechecker=typechecker)
    if isinstance(function, type):
        if is_dataclass(function) and "__init__" in vars(function):
            made: Any = function
            made.__init__ = jaxtyped(made.__init__, typechecker=typechecker)
        return function
    name = f"{function.__module__}.{function.__qualname__}"
    if name in _without or _calls.get(name, 0) >= CALLS:
        return function
    stated = list[bool]()

    def noted(made: F) -> F:
        stated.append(any(map(states_a_shape, made.__annotations__.values())))
        return typechecker(made)

    checked = _every_call(function, typechecker=noted)
    if not any(stated):
        _without.add(name)
        return function

    @wraps(function)
    def first_calls(*args: Any, **kwargs: Any) -> Any:
        before = _calls.get(name, 0)
        if before >= CALLS:
            return function(*args, **kwargs)
        _calls[name] = before + 1
        return checked(*args, **kwargs)

    return first_calls


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
