"""The slots of a phase: pictures, each at its own step, and their psi as it is loaded and stored."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.data.failures import Failures
from kvinv_pl.data.runs.tensors import Step, overflowing_rows, rounded
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.models.text.prompt_reader import as_long
from kvinv_pl.stages.curriculum import Phase
from kvinv_pl.stages.invert import mask_of


@dataclass(eq=False)
class Member:
    """A picture loaded for tuning."""

    digest: str
    """Of its pixels: random starts follow from it."""
    pivots: Float[Tensor, "levels c h w"]
    """z-hat_0 ... z-hat_T, on the CPU."""
    contexts: Float[Tensor, "2 L d"]
    """Prompt embeddings of the unconditional and the conditional branch."""
    mask: Tensor | None
    """(h, w) in 0 .. 1."""


class Slots:
    """The pictures of a phase in their slots. An empty slot has a copy that is ignored."""

    members: list[Member]
    """One a slot."""
    contexts: Float[Tensor, "2 slots L d"]
    lost: Tensor
    """(slots,): empty, or failed."""

    def __init__(
        self, denoiser: Denoiser, images: Sequence[SourceImage], negative: str, failures: Failures
    ) -> None:
        """Take the pictures that phases number; those that cannot be loaded go to `failures`."""
        self.denoiser, self.images, self.negative, self.failures = denoiser, images, negative, failures
        self._loaded: dict[int, Member] = {}

    def enter(self, phase: Phase) -> None:
        """Fill the slots for this phase; its pictures are loaded if it enters them."""
        self.phase = phase
        if not phase.enters:
            return
        self.lost = ~torch.tensor(phase.active)
        entering = {phase.members[slot]: image for slot, image in self.active()}
        self._loaded = {number: member for number, member in self._loaded.items() if number in entering}
        for number, image in entering.items():
            with self.failures.catching([image]):
                if number not in self._loaded:
                    self._loaded[number] = self._load(image)
        self.drop_failed()
        if filled := [slot for slot, _ in self.active()]:
            spare = self._loaded[phase.members[filled[0]]]
            self.members = [self._loaded.get(number, spare) for number in phase.members]
            self.contexts = torch.stack(as_long([member.contexts for member in self.members]), 1)
            masks = [member.mask for member in self.members if member.mask is not None]
            self.denoiser.bind(torch.stack(masks) if masks else None)

    def _load(self, image: SourceImage) -> Member:
        store = image.store
        contexts = self.denoiser.backbone.embed([self.negative, image.source])
        digest = store.read_run()["picture"]["sha256"]
        return Member(digest, store.trajectory(), contexts, mask_of(store))

    def active(self) -> list[tuple[int, SourceImage]]:
        """The slots that count, and the pictures in them: neither padding nor failed."""
        pairs = enumerate(zip(self.phase.members, self.phase.active, strict=True))
        images = [(slot, self.images[member]) for slot, (member, active) in pairs if active]
        return [(slot, image) for slot, image in images if image not in self.failures]

    def levels(self, steps: Sequence[int]) -> Float[Tensor, "slots c h w"]:
        """z-hat of every slot after so many steps from noise: the pivot it starts from, or is to reach."""
        T = len(self.denoiser.table)
        rows = [member.pivots[T - i] for member, i in zip(self.members, steps, strict=True)]
        return torch.stack(rows).to(self.denoiser.device)

    def start(self, seed: int) -> None:
        """Psi of every slot at the variant's own start."""
        steps, table = self.phase.steps, self.denoiser.table
        self.denoiser.reset(seed, [member.digest for member in self.members], steps)
        t = table.timesteps[torch.tensor(steps)].to(self.denoiser.device)
        self.denoiser.observe(self.z, t, self.contexts)

    def resume(self, first: int) -> None:
        """Load z-tilde at the step at which the roll-out resumes, and psi of the step before."""
        self.z = self.levels([0] * len(self.members))
        for slot, image in self.active() if first else []:
            with self.failures.catching([image]):
                before: Step = image.store.step(first - 1)
                self.z[slot] = before.z.to(self.denoiser.device)
                self.denoiser.read(before.psi, slot)
        self.drop_failed()

    def settle(self, carry: bool) -> list[int]:
        """Load psi of every slot as tuned at its pivot; return the inner steps it took there.

        With `carry`, what settling has changed at the step before is kept: psi_t starts from psi_(t+1) and
        moves by as much as their pivots' psi differ: the offset of z-tilde from its pivot changes slowly.
        """
        used = [0] * len(self.members)
        learned = {f"{cp.site.path}.{name}" for cp in self.denoiser.cps for name, _ in cp.named_parameters()}
        for slot, image in self.active():
            i = self.phase.steps[slot]
            with self.failures.catching([image]):
                psi, info = image.store.pivot(i)
                if carry and i:
                    previous, current = image.store.pivot(i - 1)[0], self.denoiser.values()
                    moved = {name: psi[name].float() - previous[name].float() for name in learned}
                    psi = {**psi, **{name: current[name][slot].cpu() + moved[name] for name in learned}}
                self.denoiser.read(psi, slot)
                used[slot] = info["inner_steps"]
        self.drop_failed()
        return used

    def round(self, dtype: str) -> None:
        """Round psi as it is stored; a picture whose psi the store cannot hold has failed."""
        values = self.denoiser.values()
        messages = overflowing_rows(values, dtype)
        for slot, image in self.active():
            if slot in messages:
                self.failures.note(image.label, messages[slot])
        self.drop_failed()
        for value in values.values():
            rows = value.view(len(value), 1, -1) if value.ndim < 3 else value  # each slot by itself
            rows.copy_(rounded(rows, dtype))

    def drop_failed(self) -> None:
        """Mark the slots of pictures that have failed since."""
        filled = [slot for slot, _ in self.active()]
        self.lost |= torch.tensor([slot not in filled for slot in range(len(self.phase.members))])
