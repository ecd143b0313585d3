"""What a check is, and where they are listed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvinv_pl.testing.harness import Factory

CHECKS: list[Check] = []
"""Every check, in the order in which they are run."""


class NonconformingError(AssertionError):
    """A variant does not pass a check."""


@dataclass(frozen=True)
class Check:
    """One property of a variant.

    Args:
        name: The property.
        why: In one sentence, what would go wrong in a run without it.
        ask: Raises NonconformingError, or whatever the variant raises, if it does not hold.
    """

    name: str
    why: str
    ask: Callable[[Factory], None]


def check(name: str, why: str) -> Callable[[Callable[[Factory], None]], Callable[[Factory], None]]:
    """Add a function to CHECKS, with its name and, in one sentence, its reason."""

    def listed(ask: Callable[[Factory], None]) -> Callable[[Factory], None]:
        CHECKS.append(Check(name, why, ask))
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
