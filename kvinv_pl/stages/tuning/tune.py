"""Stage 2 of pictures side by side: the beginning, the steps and the end of a phase."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from kvinv_pl.algorithm.tuning import reconstruct, squared_errors
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.optimizers import needs_closure, reads_residuals
from kvinv_pl.stages.curriculum import Pass, Phase
from kvinv_pl.stages.progress import Observers
from kvinv_pl.stages.tuning.certificate import Attempt
from kvinv_pl.stages.tuning.results import Results
from kvinv_pl.stages.tuning.slot_keeper import SlotKeeper
from kvinv_pl.stages.tuning.slots import Slots


class Tuning:
    """One pass of the curriculum over pictures: the phases of `plan`, z-tilde and psi in their slots.

    The caller owns the loop and the optimiser: `begin`, then `step` while not `converged`, then `end`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        attempt: Attempt,
        which: Pass,
        images: Sequence[SourceImage],
        plan: Sequence[Phase],
        observers: Observers,
    ) -> None:
        """Take the network with psi attached, as many slots wide as the phases of `plan` are.

        `images` are the pictures with the phases of this attempt, which know them by their number.
        """
        self.denoiser, self.attempt, self.settings = denoiser, attempt, attempt.settings
        self.images, self.plan, self.rolls_out = list(images), list(plan), which == "roll-out"
        self.observers, self.progress, self.failures = observers, observers.progress, observers.failures
        self.inner_steps = attempt.inner_steps(which)
        self.results = Results(denoiser, attempt, observers)
        self._slots = Slots(denoiser, self.images, self.settings.negative, self.failures)

    @property
    def converged(self) -> bool:
        """Whether every slot has stopped, and with them the phase."""
        return self._keeper.all_stopped

    # ---- a phase begins

    @torch.no_grad()
    def begin(self, n: int) -> None:
        """Phase n begins: z_t of every slot, its pivot, and where psi_t starts."""
        self._phase, slots, table = self.plan[n], self._slots, self.denoiser.table
        steps, width = self._phase.steps, len(self._phase.members)
        self.denoiser.attached()
        self.denoiser.cache.clear()
        self._first_errors: Tensor | None = None
        self._steps = torch.tensor(steps)
        self._steps_taken = self._steps_taken_at_pivots = torch.zeros(width, dtype=torch.long)
        slots.enter(self._phase)
        if self._phase.enters and (self.rolls_out or n == 0):
            self._announce()
        if not slots.active():
            self._keeper = SlotKeeper([], width, torch.ones(width, dtype=torch.bool))
            return
        self._load_slots()
        self._pivot = slots.levels([i + 1 for i in steps])
        idle = slots.lost | torch.tensor([not table.has_effect(i) for i in steps])
        learned = list(self.denoiser.psi.parameters())
        self._keeper = SlotKeeper(learned, width, idle | (not learned))

    def _load_slots(self) -> None:
        """Load z_t and psi_t of every slot, unless they continue from the phase before."""
        slots, steps = self._slots, self._phase.steps
        if not self.rolls_out:
            slots.z = slots.levels(steps)
        elif self._phase.enters:
            slots.resume(steps[0])
        if self.rolls_out and "pivots" in self.settings.passes(self.denoiser.learns):
            self._steps_taken_at_pivots = torch.tensor(slots.settle(self.settings.carry))
        elif not self.rolls_out or steps[0] == 0 or not self.settings.carry:
            slots.start(self.attempt.seed)

    def _announce(self) -> None:
        images = [image for _, image in self._slots.active()] if self.rolls_out else self.images
        name = images[0].name if len(images) == 1 else f"{len(images)} pictures"
        if self.attempt.number:
            name += f" again, with {self.attempt.inner_steps_at_most} inner steps"
        if self.rolls_out:
            self.progress.begin("tuning", name, len(self.denoiser.table) - self._phase.steps[0])
        else:
            self.progress.begin("tuning at the pivots", name, sum(sum(phase.active) for phase in self.plan))

    # ---- within a phase

    def step(
        self,
        count: int,
        optimizer: Any,
        backward: Callable[[Tensor], None],
        overflowed: Callable[[], bool] = lambda: False,
    ) -> None:
        """One optimiser step of Eq. 3, the phase's number `count`, for the slots that have not converged.

        It is made again as long as it has `overflowed`, and was left out: a phase has few.
        """
        with self.denoiser.attached().blend(), self._cached_features():
            z = self._reconstruct()
            means = self._means(squared_errors(self._pivot, z))
            self._drop_unless_finite(means)
            self._first_errors = means if self._first_errors is None else self._first_errors
            self._keeper.stop(self.settings.has_converged(means, self._steps))
            if self._keeper.all_stopped:
                return
            running = ~self._keeper.stopped
            self._steps_taken += running
            self.progress.show(
                f"{self._timesteps()}, inner step {count}, loss {float(means[running].mean()):.2e}"
            )
            active = None if bool(running.all()) else running.to(self.denoiser.device)

            values, computed = list(self.denoiser.psi.parameters()), [z]
            versions = [value._version for value in values]

            def residuals() -> Tensor:
                # an optimiser begins at the present psi, whose reconstruction is computed already
                is_computed = computed and versions == [value._version for value in values]
                z = computed.pop() if is_computed else self._reconstruct()
                errors = (z - self._pivot).flatten(1)
                return errors if active is None else torch.where(active[:, None], errors, 0)

            def closure() -> Tensor:
                optimizer.zero_grad()
                total = residuals().square().sum()
                backward(total)
                return total.detach()

            if needs_closure(optimizer):
                optimizer.step(residuals if reads_residuals(optimizer) else closure)
            else:
                self._descend(optimizer, closure)
                while overflowed():
                    self._descend(optimizer, closure)
        self._keeper.restore()

    def _descend(self, optimizer: Any, closure: Callable[[], Tensor]) -> None:
        """One step of an optimiser that is given gradients."""
        closure()
        if bool(self._slots.lost.any()):
            self._keeper.zero_gradients(self._slots.lost)
        optimizer.step()

    def _timesteps(self) -> str:
        first, last = (int(t) for t in self.denoiser.table.timesteps[self._steps[[0, -1]]])
        return f"timestep {first}" if first == last else f"timesteps {first} to {last}"

    def _reconstruct(self, z: Tensor | None = None) -> Tensor:
        """z-tilde_{t-1} for every slot, from z-tilde_t or from z."""
        eps = self.denoiser.guided_prediction(self._slots.contexts, self.settings.guidance)
        return reconstruct(eps, self._slots.z if z is None else z, self.denoiser.table, self._steps)

    def _cached_features(self) -> AbstractContextManager[None]:
        """What comes before the first upgraded layer stays while z-tilde does."""
        return self.denoiser.cache.reuse(self._slots.z, self._slots.contexts)

    def _means(self, errors: Tensor) -> Tensor:
        """The mean squared error of every slot, on the host: the one wait for the device of an inner step."""
        return (errors.detach() / self._pivot[0].numel()).cpu()

    def _drop_unless_finite(self, errors: Tensor) -> None:
        """Mark pictures whose latents have diverged as failed; the others continue."""
        lost = ~errors.isfinite() & ~self._slots.lost
        if not bool(lost.any()):
            return
        for slot, image in self._slots.active():
            if lost[slot]:
                self.failures.note(
                    image.label,
                    f"the reconstruction is no longer finite at step {self._phase.steps[slot]}: use a lower "
                    "learning rate or guidance scale, or precision 32-true",
                )
        self._slots.lost |= lost
        self._keeper.stopped |= lost  # restore() puts back what was last kept

    # ---- a phase ends

    @torch.no_grad()
    def end(self, dry_run: bool = False) -> None:
        """A phase ends: round psi_t as it is stored, make the step of Eq. 4 with it, and write both.

        A dry run writes nothing: its phase was cut short.
        """
        slots = self._slots
        if slots.active():
            self._keeper.restore()
            slots.round(self.settings.store_dtype)
        if not slots.active():
            return
        before = slots.z
        kv = self._advance()
        self.denoiser.cache.clear()
        last_errors = self._means(squared_errors(self._pivot, slots.z))
        self._drop_unless_finite(last_errors)
        if bool(slots.lost.any()):
            lost = slots.lost.to(self.denoiser.device)
            slots.z = torch.where(lost[:, None, None, None], self._pivot, slots.z)
        first_errors = last_errors if self._first_errors is None else self._first_errors
        finished = 1 if self.rolls_out else sum(self._phase.active)
        loss = float(last_errors[~slots.lost].mean())
        if not dry_run:
            self._flush()
        for slot, image in slots.active() if not dry_run else ():
            i = self._phase.steps[slot]
            figures = {
                "loss_start": float(first_errors[slot]),
                "loss_end": float(last_errors[slot]),
                "inner_steps": int(self._steps_taken[slot]),
            }
            if self.rolls_out and self.settings.curriculum == "pivot":
                figures["inner_steps_at_pivot"] = int(self._steps_taken_at_pivots[slot])
            psi = {name: value[slot] for name, value in self.denoiser.values().items()}
            with self.failures.catching([image]):
                if self.rolls_out:
                    bars = {path: (k[:, slot], v[:, slot]) for path, (k, v) in kv.items()}
                    stored = bars if self.settings.kv == "stored" else None
                    z_from, z_to = before[slot : slot + 1], slots.z[slot : slot + 1]
                    self.results.write(image, i, psi, stored, figures, z_from, z_to)
                else:
                    self.results.write_at_pivot(image, i, psi, figures)
        self.progress.advance(f"loss {loss:.2e}", finished)  # now it is done: who is told may stop here
        if not dry_run and self.rolls_out and self._phase.steps[0] == len(self.denoiser.table) - 1:
            self._flush()
            self.results.certify([image for _, image in slots.active()])

    def _advance(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Move z-tilde on with psi as it is stored; the K-bar and V-bar that an edit reads, if stored."""
        attachment, slots = self.denoiser.attached(), self._slots
        if not self.denoiser.at_pivot and self.settings.kv == "replayed":
            with attachment.blend(), self._cached_features():
                slots.z = self._reconstruct()
            return {}
        if not self.denoiser.at_pivot:
            with attachment.blend(record=True) as kv, self._cached_features():
                slots.z = self._reconstruct()
            return kv
        with attachment.blend(record=True) as kv:
            self._reconstruct(slots.levels(self._phase.steps))
        with attachment.frozen(kv):  # as an edit to the source prompt would
            slots.z = self._reconstruct()
        return kv

    def _flush(self) -> None:
        """Wait for the files of the phase before; a picture of which one cannot be written has failed."""
        self.results.writer.flush()
        self._slots.drop_failed()
