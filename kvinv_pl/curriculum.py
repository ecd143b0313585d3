"""Tuning as a curriculum: one phase a timestep, when a phase has converged, and what it starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kvinv_pl.errors import UserError


@dataclass(frozen=True)
class Phase:
    """One epoch of the fit: step `step`, counted from noise, of the pictures of batch `batch`."""

    batch: int
    step: int


@dataclass(frozen=True)
class Batch:
    """Pictures tuned side by side. A short row is filled up with copies that count for nothing."""

    members: tuple[int, ...]
    active: tuple[bool, ...]
    first: int  # the step at which it goes on


def first_missing(done: Set[int], steps: int) -> int:
    """Where a picture goes on: z-tilde of a step depends on every step before it."""
    return next((i for i in range(steps) if i not in done), steps)


def batches(done: Sequence[Set[int]], steps: int, slots: int) -> list[Batch]:
    """Unfinished pictures in batches of `slots`, those that go on at the same step together."""
    at: dict[int, list[int]] = {}
    for index, finished in enumerate(done):
        first = first_missing(finished, steps)
        if first < steps:
            at.setdefault(first, []).append(index)
    made = []
    for first, members in at.items():
        for begin in range(0, len(members), slots):
            row = members[begin : begin + slots]
            missing = slots - len(row)
            active = (True,) * len(row) + (False,) * missing
            made.append(Batch((*row, *[row[-1]] * missing), active, first))
    return made


def remaining(made: Iterable[Batch], steps: int) -> list[Phase]:
    """The phases of a fit, in order; the fit's n-th epoch is the n-th of them."""
    return [Phase(b, step) for b, batch in enumerate(made) for step in range(batch.first, steps)]


@dataclass(frozen=True)
class Convergence:
    """Algorithm 1's "until converged": a slot stops at a mean squared error within the step's tolerance.

    Null-text inversion (Mokady et al., 2023) lets the tolerance grow with the step: errors late in the
    process have fewer steps left to grow in.
    """

    tolerance: float
    growth: float

    def __post_init__(self) -> None:
        """Refuse bounds below zero."""
        if not (self.tolerance >= 0 and self.growth >= 0):
            raise UserError(
                "tolerance and tolerance_growth are squared errors, 0 or more; "
                f"got {self.tolerance}, {self.growth}"
            )

    def reached(self, mean_errors: Float[Tensor, " slots"], step: int) -> Bool[Tensor, " slots"]:
        """Which slots may stop at this step, counted from noise."""
        return mean_errors <= self.tolerance + self.growth * step


class SlotKeeper:
    """Psi of slots that have stopped, so that the optimiser's momentum does not carry them on."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], slots: int, stopped: Bool[Tensor, " slots"]
    ) -> None:
        """Watch parameters whose first axis is slots; `stopped` slots (padding) never count."""
        self.parameters = list(parameters)
        self.stopped = stopped.clone()
        self.kept = [parameter.detach().clone() for parameter in self.parameters] if slots > 1 else []

    @property
    def all_stopped(self) -> bool:
        """Whether the phase is over."""
        return bool(self.stopped.all())

    @torch.no_grad()
    def stop(self, slots: Bool[Tensor, " slots"]) -> None:
        """Keep psi of these slots as it is now."""
        new = slots & ~self.stopped
        if self.kept and bool(new.any()):
            for kept, parameter in zip(self.kept, self.parameters, strict=True):
                kept[new] = parameter[new]
        self.stopped |= new

    @torch.no_grad()
    def restore(self) -> None:
        """Put stopped slots back after an optimiser step."""
        if self.kept and bool(self.stopped.any()):
            for kept, parameter in zip(self.kept, self.parameters, strict=True):
                parameter[self.stopped] = kept[self.stopped]


def generator(seed: int, picture: str, step: int) -> torch.Generator:
    """Randomness on the CPU for one phase of one picture, whoever else is tuned and on whatever device."""
    digest = hashlib.blake2b(f"{seed} {picture} {step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
