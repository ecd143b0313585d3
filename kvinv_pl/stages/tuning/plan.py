"""The phases that remain of a pass of the curriculum over pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvinv_pl.data.failures import Failures
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.stages.curriculum import Pass, Phase, at_pivots, make_batches, missing_at_pivots, roll_out
from kvinv_pl.stages.settings import TuningSettings
from kvinv_pl.stages.tuning.certificate import Attempt


@dataclass(frozen=True)
class Planner:
    """Plans for pictures of one latent size, side by side in `slots` slots.

    Pictures that have failed keep their places, so that the others keep their slots.
    """

    denoiser: Denoiser
    settings: TuningSettings
    images: Sequence[SourceImage]
    slots: int
    failures: Failures

    def passes(self) -> tuple[Pass, ...]:
        """The passes over the timesteps of these pictures, in order."""
        for image in self.failures.remaining(self.images):
            with self.failures.catching([image]):
                self._place(image, self.slots)
                return self.settings.passes(self.denoiser.learns)
        return ("roll-out",)

    def plan(
        self, attempt: Attempt, which: Pass, tuning: Callable[[], dict[str, Any]], editing: Mapping[str, Any]
    ) -> tuple[list[SourceImage], list[Phase]]:
        """The pictures at this attempt, and the phases that remain; psi is as many slots wide as they are.

        `tuning` makes its field of run.json, once psi is attached.
        """
        images, done = [attempt.at(image) for image in self.images], list[set[int] | None]()
        for image in images:
            done.append(None)
            with self.failures.catching([image]):
                if image not in self.failures:
                    self._place(image, self.slots)
                    done[-1] = attempt.open(image, len(self.denoiser.table), tuning(), editing)
        return images, self._phases(images, done, which)

    def _phases(self, images: list[SourceImage], done: Sequence[set[int] | None], which: Pass) -> list[Phase]:
        width, steps = self.slots, len(self.denoiser.table)
        if "pivots" in self.settings.passes(self.denoiser.learns):
            width = min(width, len(images))  # slots that timesteps fill are not all filled by pictures
        batches = make_batches(done, steps, width)
        if which == "pivots":
            done_at_pivots = [image.store.done_at_pivots() for image in images]
            missing = missing_at_pivots(batches, done_at_pivots, steps, self.settings.carry)
            return at_pivots(missing, steps, self.slots)
        for image in self.failures.remaining(images)[:1]:
            self._place(image, width)
        return roll_out(batches, steps)

    def _place(self, image: SourceImage, slots: int) -> None:
        self.denoiser.place(image.store.latent_grid(), slots)
