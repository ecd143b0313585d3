"""What the slots of a phase hold: pictures, each at a step of its own, and psi of those that have stopped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kvinv_pl.data.failures import Failures
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.data.tensors import Step
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.stages.curriculum import Phase
from kvinv_pl.stages.invert import mask_of


@dataclass(eq=False)
class Member:
    """A picture as tuning takes it up."""

    work: SourceImage
    digest: str
    """Of its pixels: random starts follow from it."""
    pivots: Float[Tensor, "levels c h w"]
    """z-hat_0 ... z-hat_T, on the CPU."""
    contexts: Float[Tensor, "2 L d"]
    """What the unconditional and the conditional branch are told."""
    mask: Tensor | None
    """(h, w) in 0 .. 1."""


class Slots:
    """The pictures of a phase in their slots. An empty slot holds a copy that counts for nothing."""

    members: list[Member]
    """One a slot."""
    contexts: Float[Tensor, "2 slots L d"]
    lost: Tensor
    """(slots,): empty, or given up."""

    def __init__(
        self, denoiser: Denoiser, works: Sequence[SourceImage], negative: str, failures: Failures
    ) -> None:
        """Nothing is held yet.

        Args:
            denoiser: The model.
            works: The pictures that phases number.
            negative: What the unconditional branch is told.
            failures: Where a picture that cannot be taken up is noted.
        """
        self.denoiser, self.works, self.negative, self.failures = denoiser, works, negative, failures
        self._known: dict[int, Member] = {}

    def hold(self, phase: Phase) -> None:
        """The slots are those of this phase; its pictures are taken up where it enters them."""
        self.phase = phase
        if phase.enters:
            self._fill(phase)

    def _fill(self, phase: Phase) -> None:
        self.lost = ~torch.tensor(phase.active)
        wanted = {phase.members[slot]: work for slot, work in self.active()}
        self._known = {number: member for number, member in self._known.items() if number in wanted}
        for number, work in wanted.items():
            with self.failures.of([work]):
                if number not in self._known:
                    self._known[number] = self._taken_up(work)
        held = [slot for slot, _ in self.active()]
        self.lost |= torch.tensor([slot not in held for slot in range(len(phase.members))])
        if held:
            spare = self._known[phase.members[held[0]]]
            self.members = [self._known.get(number, spare) for number in phase.members]
            self.contexts = torch.stack([member.contexts for member in self.members], 1)
            masks = [member.mask for member in self.members if member.mask is not None]
            self.denoiser.bind(torch.stack(masks) if masks else None)

    def _taken_up(self, work: SourceImage) -> Member:
        store = work.store
        contexts = self.denoiser.backbone.embed([self.negative, work.source])
        digest = store.read_run()["picture"]["sha256"]
        return Member(work, digest, store.trajectory(), contexts, mask_of(store))

    def active(self) -> list[tuple[int, SourceImage]]:
        """The slots that count, and the pictures in them: no padding, and nothing given up."""
        pairs = enumerate(zip(self.phase.members, self.phase.active, strict=True))
        found = [(slot, self.works[member]) for slot, (member, active) in pairs if active]
        return [(slot, work) for slot, work in found if work not in self.failures]

    def levels(self, steps: Sequence[int]) -> Float[Tensor, "slots c h w"]:
        """z-hat of every slot after so many steps from noise: the pivot that it left, or is to reach."""
        T = len(self.denoiser.table)
        rows = [member.pivots[T - i] for member, i in zip(self.members, steps, strict=True)]
        return torch.stack(rows).to(self.denoiser.device)

    def start(self, seed: int) -> None:
        """Psi of every slot at the variant's own start."""
        steps, table = self.phase.steps, self.denoiser.table
        self.denoiser.reset(seed, [member.digest for member in self.members], steps)
        t = table.timesteps[torch.tensor(steps)].to(self.denoiser.device)
        self.denoiser.observe(self.z, t, self.contexts)

    def go_on(self, first: int) -> None:
        """z-tilde at the step where the roll-out of the pictures goes on, and psi of the step before."""
        self.z = self.levels([0] * len(self.members))
        for slot, work in self.active() if first else []:
            with self.failures.of([work]):
                before: Step = work.store.step(first - 1)
                self.z[slot] = before.z.to(self.denoiser.device)
                self.denoiser.read(before.psi, slot)
        self._drop_failed()

    def settle(self, carry: bool) -> list[int]:
        """Psi of every slot as its pivot left it; the inner steps that it took there.

        With `carry`, what settling has changed at the step before is kept: psi_t starts from psi_(t+1) and
        moves by as much as their pivots' psi differ. Where z-tilde has come to changes slowly with t.
        """
        used = [0] * len(self.members)
        learned = {f"{cp.site.path}.{name}" for cp in self.denoiser.cps for name, _ in cp.named_parameters()}
        for slot, work in self.active():
            i = self.phase.steps[slot]
            with self.failures.of([work]):
                psi, info = work.store.pivot(i)
                if carry and i:
                    before, here = work.store.pivot(i - 1)[0], self.denoiser.values()
                    moved = {name: psi[name].float() - before[name].float() for name in learned}
                    psi = {**psi, **{name: here[name][slot].cpu() + moved[name] for name in learned}}
                self.denoiser.read(psi, slot)
                used[slot] = info["inner_steps"]
        self._drop_failed()
        return used

    def _drop_failed(self) -> None:
        held = [slot for slot, _ in self.active()]
        self.lost |= torch.tensor([slot not in held for slot in range(len(self.members))])


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
