"""Stage 2 of pictures side by side: what happens at the beginning, within and at the end of a phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvinv_pl import logbook, rounding, stages
from kvinv_pl.attempts import Attempt
from kvinv_pl.curriculum import Phase, SlotKeeper
from kvinv_pl.ddim import predicted_z_0
from kvinv_pl.failures import Failures
from kvinv_pl.network import Network
from kvinv_pl.optimizers import needs_closure, reads_residuals
from kvinv_pl.progress import Progress
from kvinv_pl.store import Step
from kvinv_pl.tuning import reconstruct, squared_errors
from kvinv_pl.work import Work


@dataclass(eq=False)
class Member:
    """A picture as tuning takes it up."""

    work: Work
    digest: str
    """Of its pixels: random starts follow from it."""
    pivots: Float[Tensor, "levels c h w"]
    """z-hat_0 ... z-hat_T, on the CPU."""
    contexts: Float[Tensor, "2 L d"]
    """What the unconditional and the conditional branch are told."""
    mask: Tensor | None
    """(h, w) in 0 .. 1."""
    before: Step | None
    """The step at whose end the picture goes on; None where it begins."""


class Fit:
    """The phases `plan` of the pictures `works`; the slots, z-tilde in them and where psi stopped.

    Who calls it owns the loop and the optimiser: `begin`, then `step` while not `converged`, then `end`.
    """

    def __init__(
        self,
        network: Network,
        attempt: Attempt,
        works: Sequence[Work],
        plan: Sequence[Phase],
        failures: Failures,
        watch: Progress,
        x_0_every: int = 0,
    ) -> None:
        """Take the network with psi attached, as many slots wide as the phases are.

        Args:
            network: The model.
            attempt: How psi is tuned.
            works: The pictures, with the phases of this attempt; phases know them by their number.
            plan: The phases that remain, in order.
            failures: Where a picture that cannot go on is noted.
            watch: What the person who waits is told.
            x_0_every: Every so many timesteps the predicted x_0 is logged; 0: never.
        """
        self.network, self.attempt, self.recipe = network, attempt, attempt.recipe
        self.works, self.plan = list(works), list(plan)
        self.failures, self.watch, self.x_0_every = failures, watch, x_0_every
        self.loggers: Sequence[Any] = []

    @property
    def converged(self) -> bool:
        """Whether every slot has stopped, and with them the phase."""
        return self._keeper.all_stopped

    # ---- a phase begins

    @torch.no_grad()
    def begin(self, n: int) -> None:
        """Phase n begins: z_t of every slot, its pivot, and where psi_t starts."""
        self._phase = phase = self.plan[n]
        self.network.attached()
        self.network.front.forget()
        if phase.enters:
            self._enter(phase)
        slots, table = len(phase.members), self.network.table
        self._steps = torch.tensor(phase.steps)
        self._first_errors: Tensor | None = None
        self._used = torch.zeros(slots, dtype=torch.long)
        if not self._active():
            self._keeper = SlotKeeper([], slots, torch.ones(slots, dtype=torch.bool))
            return
        self._pivot = self._level(self._steps + 1)
        if phase.steps[0] == 0 or not self.recipe.carry:
            self._start()
        idle = self._lost | torch.tensor([not table.has_effect(i) for i in phase.steps])
        learned = list(self.network.psi.parameters())
        self._keeper = SlotKeeper(learned, slots, idle | (not learned))

    def _enter(self, phase: Phase) -> None:
        """Take up the pictures of a phase in their slots, at the steps where they go on."""
        self._lost = ~torch.tensor(phase.active)
        found: dict[int, Member] = {}
        for slot, work in self._active():
            with self.failures.of([work]):
                found[slot] = self._taken_up(work, phase.steps[slot])
        if not found:
            return
        self._lost |= torch.tensor([slot not in found for slot in range(len(phase.members))])
        spare = next(iter(found.values()))
        # an empty slot is a copy that counts for nothing
        self._members = [found.get(slot, spare) for slot in range(len(phase.members))]
        self._contexts = torch.stack([member.contexts for member in self._members], 1)
        masks = [member.mask for member in self._members if member.mask is not None]
        self.network.bind(torch.stack(masks) if masks else None)
        self._z = self._level(torch.tensor(phase.steps))
        for slot, member in enumerate(self._members):
            if member.before is not None:
                self._z[slot] = member.before.z.to(self.network.device)
                self.network.read(member.before.psi, slot)  # psi_(t+1), as it was stored
        active = self._active()
        name = active[0][1].name if len(active) == 1 else f"{len(active)} pictures"
        number = self.attempt.number
        again = f" again, with {self.attempt.inner_steps} inner steps" if number else ""
        self.watch.begin("tuning", f"{name}{again}", len(self.network.table) - phase.steps[0])

    def _taken_up(self, work: Work, i: int) -> Member:
        """A picture that goes on at step i."""
        store = work.store
        before = store.step(i - 1) if i else None
        contexts = self.network.backbone.embed([self.recipe.negative, work.source])
        digest = store.read_run()["picture"]["sha256"]
        return Member(work, digest, store.trajectory(), contexts, stages.mask_of(store), before)

    def _level(self, steps: Tensor) -> Float[Tensor, "slots c h w"]:
        """The pivot of every slot after so many steps from noise."""
        T = len(self.network.table)
        rows = [member.pivots[T - int(i)] for member, i in zip(self._members, steps, strict=True)]
        return torch.stack(rows).to(self.network.device)

    def _start(self) -> None:
        """Psi at the variant's own start."""
        digests = [member.digest for member in self._members]
        self.network.reset(self.attempt.seed, digests, self._phase.steps)
        t = self.network.table.timesteps[self._steps].to(self.network.device)
        self.network.observe(self._z, t, self._contexts)

    # ---- within a phase

    def step(self, count: int, optimizer: Any, backward: Callable[[Tensor], None]) -> None:
        """One optimiser step of Eq. 3, the phase's number `count`, for the slots that have not converged."""
        with self.network.attached().blend(), self.network.front.kept():
            z = self._reconstruct()
            errors = squared_errors(self._pivot, z)
            self._give_up_unless_finite(errors)
            means = (errors.detach() / self._pivot[0].numel()).cpu()
            self._first_errors = means if self._first_errors is None else self._first_errors
            self._keeper.stop(self.recipe.convergence.reached(means, self._steps))
            if self._keeper.all_stopped:
                return
            running = ~self._keeper.stopped
            self._used += running
            self.watch.show(f"{self._where()}, inner step {count}, loss {float(means[running].mean()):.2e}")
            running = running.to(self.network.device)

            values, known = list(self.network.psi.parameters()), [z]
            at = [value._version for value in values]

            def residuals() -> Tensor:
                # an optimiser begins where psi is, and what is missed there has been computed
                fresh = known and at == [value._version for value in values]
                z = known.pop() if fresh else self._reconstruct()
                return torch.where(running[:, None], (z - self._pivot).flatten(1), 0)

            def lowered() -> float:
                optimizer.zero_grad()
                total = residuals().square().sum()
                backward(total)
                return float(total.detach())

            if needs_closure(optimizer):
                closure: Any = residuals if reads_residuals(optimizer) else lowered
                optimizer.step(closure)
            else:
                optimizer.zero_grad()
                backward(errors[running].sum())
                if bool(self._lost.any()):
                    self._keeper.silence(self._lost)
                optimizer.step()
        self._keeper.restore()

    def _where(self) -> str:
        """Which timestep is tuned, as the person is told."""
        return f"timestep {int(self.network.table.timesteps[self._phase.steps[0]])}"

    def _reconstruct(self, z: Tensor | None = None) -> Tensor:
        """z-tilde_{t-1} for every slot, from z-tilde_t or from z."""
        eps = self.network.guided_eps(self._contexts, self.recipe.guidance)
        return reconstruct(eps, self._z if z is None else z, self.network.table, self._steps)

    def _give_up_unless_finite(self, errors: Tensor) -> None:
        """A picture whose latents have run away is given up; those beside it go on."""
        lost = ~errors.detach().isfinite().cpu() & ~self._lost
        if not bool(lost.any()):
            return
        for slot, work in self._active():
            if lost[slot]:
                self.failures.note(
                    work.label,
                    f"the reconstruction is no longer finite at step {self._phase.steps[slot]}: use a lower "
                    "learning rate or guidance scale, or precision 32-true",
                )
        self._lost |= lost
        self._keeper.give_up(lost)

    # ---- a phase ends

    @torch.no_grad()
    def end(self, rehearsal: bool = False) -> None:
        """A phase ends: round psi_t as it is stored, advance z-tilde with it, and write both.

        A rehearsal writes nothing: its phase was cut short.
        """
        if not self._active():
            return
        self._keeper.restore()
        for value in self.network.values().values():
            value.copy_(rounding.rounded(value, self.recipe.store_dtype))
        before = self._z
        kv = self._advance()
        self.network.front.forget()
        ends = (squared_errors(self._pivot, self._z) / self._pivot[0].numel()).cpu()
        self._give_up_unless_finite(ends)
        lost = self._lost.to(self.network.device)
        self._z = torch.where(lost[:, None, None, None], self._pivot, self._z)
        begins = ends if self._first_errors is None else self._first_errors
        self.watch.advance(f"loss {float(ends[~self._lost].mean()):.2e}")
        if rehearsal:
            return
        for slot, work in self._active():
            i = self._phase.steps[slot]
            psi = {name: value[slot].cpu() for name, value in self.network.values().items()}
            bars = {path: (k[:, slot].cpu(), v[:, slot].cpu()) for path, (k, v) in kv.items()}
            figures = {
                "loss_start": float(begins[slot]),
                "loss_end": float(ends[slot]),
                "inner_steps": int(self._used[slot]),
            }
            stored = bars if self.recipe.kv == "stored" else None
            with self.failures.of([work]):
                work.store.save_step(i, psi, self._z[slot].cpu(), stored, figures, self.recipe.store_dtype)
            name = self.attempt.logged_as(work)
            logbook.log_phase(self.loggers, name, i, figures, self.network.device)
            self._show_z_0(name, i, before[slot : slot + 1], self._z[slot : slot + 1])
        if self._phase.steps[0] == len(self.network.table) - 1:
            self._certify_slots()

    def _advance(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Move z-tilde on with psi as it is stored; the K-bar and V-bar that an edit reads."""
        attachment = self.network.attached()
        if not self.network.at_pivot:
            with attachment.recording() as kv, self.network.front.kept():
                self._z = self._reconstruct()
            return kv
        with attachment.recording() as kv:
            self._reconstruct(self._level(self._steps))
        with attachment.frozen(kv):  # as an edit to the source prompt would
            self._z = self._reconstruct()
        return kv

    def _show_z_0(self, name: str, i: int, z_from: Tensor, z_to: Tensor) -> None:
        """Every few steps, hand the loggers the picture that the process believes in (the paper's Fig. 3)."""
        table = self.network.table
        if self.loggers and self.x_0_every and i % self.x_0_every == 0 and table.has_effect(i):
            z_0 = predicted_z_0(z_from, z_to, table.alphas[i], table.alphas[i + 1])
            pixels = self.network.backbone.decode(z_0)[0].cpu()
            logbook.log_picture(self.loggers, f"{name}/predicted_x_0", i, pixels)

    def _active(self) -> list[tuple[int, Work]]:
        """The slots that count, and the pictures in them: no padding, and nothing given up."""
        pairs = enumerate(zip(self._phase.members, self._phase.active, strict=True))
        found = [(slot, self.works[member]) for slot, (member, active) in pairs if active]
        return [(slot, work) for slot, work in found if work not in self.failures]

    # ---- the end of a picture's tuning

    def certify_rest(self) -> None:
        """Do what a fit that was stopped after its last phase has left undone."""
        for work in self.works:
            with self.failures.of([work]):
                if work not in self.failures and self.attempt.is_due(work):
                    self._certify(work)

    def _certify_slots(self) -> None:
        """The pictures in the slots are tuned: write their certificates, and say what they are worth."""
        worth = list[float]()
        for _, work in self._active():
            with self.failures.of([work]):
                worth.append(self._certify(work))
        demanded = self.attempt.demand.psnr
        below = sum(value < demanded for value in worth)
        missed = f"; {below} below the {demanded:g} dB asked for" if below else ""
        shown = ", ".join(f"{value:.1f}" for value in worth)
        self.watch.finish(f"reconstruction {shown} dB to the VAE round trip{missed}")

    def _certify(self, work: Work) -> float:
        """Write the certificate of a tuned picture; its PSNR to the VAE round trip in dB."""
        record = self.attempt.certify(self.network, work)
        logbook.log_result(self.loggers, work.store.folder.name, record)
        return record["psnr_to_round_trip"]
