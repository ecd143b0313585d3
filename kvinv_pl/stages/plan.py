"""What remains to be done of a pass of the curriculum over pictures, as phases, and who does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from kvinv_pl.data.failures import Failures
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.stages.certificate import Attempt
from kvinv_pl.stages.curriculum import Pass, Phase, at_pivots, batches, missing_at_pivots, roll_out
from kvinv_pl.stages.settings import TuningSettings


class Claims(Protocol):
    """Who works on which phase of a plan that several ranks have."""

    def take(self, n: int) -> bool:
        """Whether phase n is the caller's; it is one rank's alone."""
        ...

    def done(self, n: int, reasons: Mapping[str, str]) -> None:
        """Phase n, taken before, is written; why pictures were given up, by their labels."""
        ...

    def give_back(self, n: int) -> None:
        """Phase n, taken before, is for another rank to make."""
        ...

    def given_up(self) -> dict[str, str]:
        """Why any rank has given pictures up, by their labels, in the phases that are done."""
        ...

    @property
    def has_more(self) -> bool:
        """Whether there is a phase that nobody has taken."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether every phase is written, by whichever rank."""
        ...


class Alone:
    """The claims of a rank that has a plan for itself, and that goes through it once."""

    has_more, is_done = False, True

    def take(self, n: int) -> bool:
        """Every phase is this rank's."""
        return True

    def done(self, n: int, reasons: Mapping[str, str]) -> None:
        """Nobody waits for it."""

    def give_back(self, n: int) -> None:
        """There is nobody to make it."""

    def given_up(self) -> dict[str, str]:
        """Nothing that this rank does not know."""
        return {}


Record = Callable[[], dict[str, Any]]
"""A field of run.json, as it is with psi attached."""


class Planner:
    """Plans for pictures of one latent size, side by side in `slots` slots.

    Pictures that have failed keep their places, so that the slots of the others are what they would be.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        settings: TuningSettings,
        works: Sequence[SourceImage],
        slots: int,
        failures: Failures,
    ) -> None:
        """Take the pictures in their order."""
        self.denoiser, self.settings, self.works = denoiser, settings, list(works)
        self.slots, self.failures = slots, failures

    def passes(self) -> tuple[Pass, ...]:
        """The passes over the timesteps of these pictures, in order."""
        for work in self.failures.left(self.works):
            with self.failures.of([work]):
                self._place(work, self.slots)
                return self.settings.passes(self.denoiser.learns)
        return ("roll-out",)

    def plan(
        self, attempt: Attempt, which: Pass, tuning: Record, editing: Mapping[str, Any]
    ) -> tuple[list[SourceImage], list[Phase]]:
        """The pictures at this attempt, and the phases that remain; psi is as many slots wide as they are.

        Args:
            attempt: Which one.
            which: The pass.
            tuning: What psi depends on.
            editing: What an edit takes where nothing else is said.
        """
        works, done = [attempt.at(work) for work in self.works], list[set[int] | None]()
        for work in works:
            done.append(None)
            with self.failures.of([work]):
                if work not in self.failures:
                    self._place(work, self.slots)
                    done[-1] = attempt.take_up(work, len(self.denoiser.table), tuning(), editing)
        return works, self._phases(works, done, which)

    def join(self, attempt: Attempt) -> list[SourceImage]:
        """The pictures at an attempt whose phases another process has planned.

        Psi is as many slots wide as there are.
        """
        works = [attempt.at(work) for work in self.works]
        for work in self.failures.left(works)[:1]:
            self._place(work, self.slots)
        return works

    def _phases(self, works: list[SourceImage], done: Sequence[set[int] | None], which: Pass) -> list[Phase]:
        width, steps = self.slots, len(self.denoiser.table)
        if "pivots" in self.settings.passes(self.denoiser.learns):
            width = min(width, len(works))  # slots that timesteps fill are not all filled by pictures
        rolling = batches(done, steps, width)
        if which == "pivots":
            there = [work.store.done_at_pivots() for work in works]
            missing = missing_at_pivots(rolling, there, steps, self.settings.carry)
            return at_pivots(missing, steps, self.slots)
        for work in self.failures.left(works)[:1]:
            self._place(work, width)
        return roll_out(rolling, steps)

    def _place(self, work: SourceImage, slots: int) -> None:
        self.denoiser.place(work.store.latent_grid(), slots)
