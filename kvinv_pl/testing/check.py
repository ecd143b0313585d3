"""What a check is, and where they are listed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

CHECKS: list[Check] = []
"""Every check of a variant, in the order in which they are run."""
METHOD_CHECKS: list[Check] = []
"""The same of a method."""


class NonconformingError(AssertionError):
    """A variant or a method does not pass a check."""


@dataclass(frozen=True)
class Check:
    """One property of a variant or a method.

    Args:
        name: The property.
        why: In one sentence, what would go wrong in a run without it.
        ask: Is given what makes the variant or the method; raises NonconformingError, or whatever that one
            raises, if the property does not hold.
    """

    name: str
    why: str
    ask: Callable[[Any], None]


def check(
    name: str, why: str, among: list[Check] | None = None
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Add a function to CHECKS, or to the list given, with its name and, in one sentence, its reason."""

    def listed(ask: Callable[[Any], None]) -> Callable[[Any], None]:
        (CHECKS if among is None else among).append(Check(name, why, ask))
        return ask

    return listed


def same(got: Tensor, wanted: Tensor, what: str, tolerance: float = 2e-5) -> None:
    """Raise if two tensors differ by more than rounding, or are not finite."""
    got, wanted = got.detach().float(), wanted.detach().float()
    if not got.isfinite().all():
        raise NonconformingError(f"{what}: the result is not finite")
    difference = float((got - wanted).abs().max())
    if not difference <= tolerance * (1 + float(wanted.abs().max())):
        raise NonconformingError(f"{what}: differs by up to {difference:.2g}")
