"""Tuning as a curriculum: the phases, and which pictures and timesteps they have."""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Literal

Curriculum = Literal["sequential", "pivot"]
"""sequential: z-tilde rolls out, and each timestep is tuned at the current z-tilde (the paper's). pivot: each
timestep is tuned at its pivot z-hat_t, and then settled at the z-tilde of the roll-out."""
Pass = Literal["pivots", "roll-out"]
"""A part of the curriculum: all timesteps at their pivots, or z-tilde rolling out."""


@dataclass(frozen=True)
class Phase:
    """One epoch of the fit: the picture in each slot, and its step, counted from noise.

    An empty slot has a copy that is ignored.
    """

    members: tuple[int, ...]
    steps: tuple[int, ...]
    active: tuple[bool, ...]
    enters: bool
    """Whether the slots are filled here, rather than by the phase before."""


@dataclass(frozen=True)
class Batch:
    """Pictures tuned side by side, each in its slot. An empty slot has a copy that is ignored."""

    members: tuple[int, ...]
    active: tuple[bool, ...]
    first: int  # the step at which it resumes


def first_missing(done: Set[int], steps: int) -> int:
    """The step at which a picture resumes: z-tilde of a step depends on every step before it."""
    return next((i for i in range(steps) if i not in done), steps)


def make_batches(done: Sequence[Set[int] | None], steps: int, slots: int) -> list[Batch]:
    """Unfinished pictures in batches of `slots`, by the step at which they resume; None: finished.

    Who shares a batch, and in which slot, follows from the order alone and not from what is done, so that a
    resumed fit computes the same as one that was not stopped. For the same reason a picture that is one step
    ahead, as a kill between the files of one phase leaves it, makes that step again.
    """
    batches = []
    for begin in range(0, len(done), slots):
        row = enumerate(done[begin : begin + slots])
        firsts = {slot: first_missing(each, steps) for slot, each in row if each is not None}
        waiting = {slot: first for slot, first in firsts.items() if first < steps}
        while waiting:
            first = min(waiting.values())
            active = [slot for slot, at in firsts.items() if first <= at <= first + 1]
            members = [begin + (slot if slot in active else active[0]) for slot in range(slots)]
            batches.append(Batch(tuple(members), tuple(slot in active for slot in range(slots)), first))
            waiting = {slot: at for slot, at in waiting.items() if slot not in active}
    return batches


def roll_out(batches: Iterable[Batch], steps: int) -> list[Phase]:
    """The phases in which z-tilde of every batch rolls out, in order: all slots are at the same step."""
    return [
        Phase(batch.members, (step,) * len(batch.members), batch.active, step == batch.first)
        for batch in batches
        for step in range(batch.first, steps)
    ]


def missing_at_pivots(
    batches: Iterable[Batch], done: Sequence[Set[int]], steps: int, carry: bool
) -> list[set[int]]:
    """The steps of each picture that are still to be tuned at their pivots, for the batches to roll out.

    With `carry`, a resumed batch needs the step before, too.
    """
    missing = [set[int]() for _ in done]
    for batch in batches:
        for member, active in zip(batch.members, batch.active, strict=True):
            if active:
                missing[member] = {*range(max(0, batch.first - carry), steps)} - done[member]
    return missing


def at_pivots(needed: Sequence[Set[int]], steps: int, slots: int) -> list[Phase]:
    """The phases in which timesteps are tuned at their pivots, `needed` being those of each picture.

    Timesteps at their pivots do not depend on each other, so all of them, of one picture after the other,
    fill the slots. Which of them share a phase, and in which slot, follows from the order alone and not from
    what is needed, so that a resumed fit computes the same as one that was not stopped.
    """
    every = [(picture, step) for picture in range(len(needed)) for step in range(steps)]
    phases = []
    for begin in range(0, len(every), slots):
        items = every[begin : begin + slots]
        active = [step in needed[picture] for picture, step in items]
        if any(active):
            empty = slots - len(items)
            members, at = zip(*items, *[items[-1]] * empty, strict=True)
            phases.append(Phase(members, at, (*active, *[False] * empty), True))
    return phases
