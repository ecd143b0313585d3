"""Tuning as a curriculum: which timesteps a phase holds, when it has converged, and what it starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvinv_pl.errors import UserError

Curriculum = Literal["sequential", "pivot"]
"""sequential: z-tilde rolls out, and every timestep is tuned where it has come to (the paper's). pivot: every
timestep is tuned at its pivot z-hat_t, and then settled where z-tilde comes to in rolling out."""
Pass = Literal["pivots", "roll-out"]
"""A part of the curriculum: all timesteps at their pivots, or z-tilde rolling out."""


@dataclass(frozen=True)
class Phase:
    """One epoch of the fit: which picture each slot holds, and at which step, counted from noise.

    An empty slot holds a copy that counts for nothing.
    """

    members: tuple[int, ...]
    steps: tuple[int, ...]
    active: tuple[bool, ...]
    enters: bool
    """Whether the slots are filled here, rather than by the phase before."""


@dataclass(frozen=True)
class Batch:
    """Pictures tuned side by side, each in its slot. An empty slot holds a copy that counts for nothing."""

    members: tuple[int, ...]
    active: tuple[bool, ...]
    first: int  # the step at which it goes on


def first_missing(done: Set[int], steps: int) -> int:
    """Where a picture goes on: z-tilde of a step depends on every step before it."""
    return next((i for i in range(steps) if i not in done), steps)


def batches(done: Sequence[Set[int] | None], steps: int, slots: int) -> list[Batch]:
    """Unfinished pictures in batches of `slots`, those that go on at the same step together; None: leave it.

    Who shares a batch, and in which slot, follows from the order alone and not from what is done, so that a
    fit that goes on computes what it would have computed. For the same reason a picture that is one step
    ahead, as a kill between the files of one phase leaves it, makes that step again.
    """
    found = []
    for begin in range(0, len(done), slots):
        row = enumerate(done[begin : begin + slots])
        firsts = {slot: first_missing(made, steps) for slot, made in row if made is not None}
        waiting = {slot: first for slot, first in firsts.items() if first < steps}
        while waiting:
            first = min(waiting.values())
            active = [slot for slot, at in firsts.items() if first <= at <= first + 1]
            members = [begin + (slot if slot in active else active[0]) for slot in range(slots)]
            found.append(Batch(tuple(members), tuple(slot in active for slot in range(slots)), first))
            waiting = {slot: at for slot, at in waiting.items() if slot not in active}
    return found


def roll_out(made: Iterable[Batch], steps: int) -> list[Phase]:
    """The phases in which z-tilde of every batch rolls out, in order: all slots are at the same step."""
    return [
        Phase(batch.members, (step,) * len(batch.members), batch.active, step == batch.first)
        for batch in made
        for step in range(batch.first, steps)
    ]


def missing_at_pivots(
    made: Iterable[Batch], done: Sequence[Set[int]], steps: int, carry: bool
) -> list[set[int]]:
    """The steps of each picture that are still to be tuned at their pivots, for the batches to roll out.

    With `carry`, a batch that goes on needs the step before, too.
    """
    missing = [set[int]() for _ in done]
    for batch in made:
        for member, active in zip(batch.members, batch.active, strict=True):
            if active:
                missing[member] = {*range(max(0, batch.first - carry), steps)} - done[member]
    return missing


def at_pivots(needed: Sequence[Set[int]], steps: int, slots: int) -> list[Phase]:
    """The phases in which timesteps are tuned at their pivots, `needed` being those of each picture.

    Timesteps at their pivots do not depend on each other, so all of them, of one picture after the other,
    fill the slots. Which of them share a phase, and in which slot, follows from the order alone and not from
    what is needed, so that a fit that goes on computes what it would have computed.
    """
    every = [(picture, step) for picture in range(len(needed)) for step in range(steps)]
    found = []
    for begin in range(0, len(every), slots):
        items = every[begin : begin + slots]
        active = [step in needed[picture] for picture, step in items]
        if any(active):
            empty = slots - len(items)
            members, at = zip(*items, *[items[-1]] * empty, strict=True)
            found.append(Phase(members, at, (*active, *[False] * empty), True))
    return found


@dataclass(frozen=True)
class Convergence:
    """Algorithm 1's "until converged": a slot stops at a mean squared error within the step's tolerance.

    Null-text inversion (Mokady et al., 2023) lets the tolerance grow with the step: errors late in the
    process have fewer steps left to grow in.
    """

    tolerance: float
    growth: float

    def __post_init__(self) -> None:
        """Refuse bounds below zero, by the names that they have as settings."""
        for name, bound in {"tolerance": self.tolerance, "tolerance_growth": self.growth}.items():
            if not bound >= 0:
                raise UserError(f"{name}: expected a mean squared error of 0 or more, got {bound}")

    def reached(
        self, mean_errors: Float[Tensor, " slots"], steps: Int[Tensor, " slots"]
    ) -> Bool[Tensor, " slots"]:
        """Which slots may stop, each at its step, counted from noise."""
        return mean_errors <= (self.tolerance + self.growth * steps.double()).to(mean_errors)


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

    def give_up(self, slots: Bool[Tensor, " slots"]) -> None:
        """Stop slots that cannot go on; restore() takes them back to where they were last kept."""
        self.stopped |= slots

    @torch.no_grad()
    def silence(self, slots: Bool[Tensor, " slots"]) -> None:
        """Forget the gradients of slots that are no longer finite, which a gradient scaler would count."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad[slots] = 0.0

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
