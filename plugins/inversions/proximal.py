"""Proximal guidance (Han et al., 2024, ProxEdit)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.method import Inverted, Scene
from kvinv_pl.errors import UserError


@dataclass(frozen=True)
class Proximal:
    """Proximal guidance (Han et al., 2024, ProxEdit) on negative-prompt inversion.

    Small differences of the prompts count for nothing: eps = eps(source) + w prox(eps(target) - eps(source)).
    The proximal operator of the l0 norm keeps a value above the threshold lambda as it is, that of l1 makes
    it smaller by lambda; both make zero of the rest. (The authors' code makes it smaller by lambda for l0 as
    well, and by twice that for l1.) lambda is a quantile of the absolute differences of source and target
    together, as in that code: the source has none, so that .75 keeps half of the target's. Below a timestep,
    z_{t-1} moves towards the source's trajectory wherever nothing was kept (inversion guidance). With
    `prompt_to_prompt` this is ProxNPI, with `masactrl` ProxMasaCtrl.

    Args:
        quantile: The quantile of the differences that is lambda; as published.
        norm: l0 or l1.
        until: The timestep below which the unedited part is put back; 0: never.
        rate: How far it is put back; at 1 entirely, as published.
        spread: By how many latent pixels the edited part is larger.
        guidance: Guidance scale of the target, if the edit has none of its own; as published.
    """

    quantile: float = 0.75
    norm: Literal["l0", "l1"] = "l0"
    until: int = 400
    rate: float = 1.0
    spread: int = 1
    guidance: float = 7.5
    properties = ("reconstructs",)

    def __post_init__(self) -> None:
        """Refuse what is no quantile and no norm."""
        if not 0 <= self.quantile <= 1:
            raise UserError(f"quantile: expected 0 to 1, got {self.quantile}")
        if self.norm not in ("l0", "l1"):
            raise UserError(f"norm: expected l0 or l1, got {self.norm!r}")

    def invert(self, scene: Scene) -> Inverted:
        """Begin at z-hat_T, with the source prompt as the negative one, and keep the trajectory."""
        pivots = scene.pivots()
        return ProximalGuidance(scene, pivots[0], negative=scene.contexts[1:2], chosen=self, pivots=pivots)


@dataclass(eq=False)
class ProximalGuidance(Inverted):
    """DDIM's steps by what the proximal operator leaves, and back to the source where it leaves nothing."""

    chosen: Proximal = field(default_factory=Proximal)
    pivots: Float[Tensor, "levels 1 c h w"] | None = field(default=None, repr=False)
    thresholded: Float[Tensor, "2 c h w"] | None = field(default=None, repr=False)
    """Of the last step: what the proximal operator left."""

    def contexts(self, i: int) -> Float[Tensor, "branches 2 L d"]:
        """Both branches, at a guidance of 1 as well."""
        negative = self.scene.contexts[1:2] if self.negative is None else self.negative
        return torch.stack([negative.expand(2, -1, -1), self.scene.contexts[1:]])

    def guided(self, i: int, out: Float[Tensor, "branches 2 c h w"]) -> Float[Tensor, "2 c h w"]:
        """eps(source) + w prox(eps(target) - eps(source))."""
        difference = out[-1] - out[0]
        size = difference.abs()
        rank = round(self.chosen.quantile * size.numel())
        least = size.flatten().kthvalue(rank).values if rank else torch.zeros_like(size[0, 0, 0, 0])
        thresholded = torch.where(size > least, difference, 0)
        if self.chosen.norm == "l1":
            thresholded = thresholded - thresholded.sign() * least
        self.thresholded = thresholded
        w = torch.tensor(self.scales, device=out.device).view(2, 1, 1, 1)
        return out[0] + w * thresholded

    def step(
        self, i: int, z: Float[Tensor, "2 c h w"], out: Float[Tensor, "2 c h w"]
    ) -> Float[Tensor, "2 c h w"]:
        """Inversion guidance: z_{t-1} - rate (z_{t-1} - z*_{t-1}) outside the edited part."""
        moved = super().step(i, z, out)
        early = self.scene.table.timesteps[i] >= self.chosen.until
        if self.thresholded is None or self.pivots is None or early:
            return moved
        r = self.chosen.spread
        edited = F.max_pool2d((self.thresholded != 0).float(), 2 * r + 1, 1, r) > 0
        return torch.where(edited, moved, moved + self.chosen.rate * (self.pivots[i + 1] - moved))
