"""Aligned inversion (DirectEdit, 2026), for DDIM."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.method import Inverted, Scene


@dataclass(eq=False)
class Aligned(Inverted):
    """DDIM's steps, for which the network is asked where the inversion asked it."""

    pivots: Float[Tensor, "levels 1 c h w"] | None = field(default=None, repr=False)

    def seen(self, i: int, z: Float[Tensor, "2 c h w"]) -> Float[Tensor, "2 c h w"]:
        """z_t + Delta_t; for the source this is z*_{t-1}."""
        if self.pivots is None:
            return z
        return torch.cat([self.pivots[i + 1], z[1:] + self.pivots[i + 1] - self.pivots[i]])

    def step(
        self, i: int, z: Float[Tensor, "2 c h w"], out: Float[Tensor, "2 c h w"]
    ) -> Float[Tensor, "2 c h w"]:
        """DDIM from z_t, with the noise at z_t + Delta_t."""
        alpha, to = float(self.scene.table.alphas[i]), float(self.scene.table.alphas[i + 1])
        eps = self.scene.table.epsilon(self.seen(i, z), out, i)
        z_0 = (z - (1 - alpha) ** 0.5 * eps) / alpha**0.5
        return to**0.5 * z_0 + (1 - to) ** 0.5 * eps


@dataclass(frozen=True)
class AlignedInversion:
    """Aligned inversion (DirectEdit, 2026), on DDIM: every call of the source is the inversion's own call.

    DDIM inversion goes from z*_{t-1} to z*_t by the noise at z*_{t-1}, and sampling takes it at z_t: hence
    the drift. Here sampling takes it at z_t + Delta_t with Delta_t = z*_{t-1} - z*_t, for the source and for
    the target: the source returns exactly, at the inversion's guidance and without further calls, and what
    an edit reads of it is what the inversion saw. Published for models of rectified flow, whose steps are
    linear in the same way.

    Args:
        inversion_guidance: Guidance scale of the source, in the inversion too.
        guidance: Guidance scale of the target, if the edit has none of its own.
    """

    inversion_guidance: float = 1.0
    guidance: float = 7.5
    properties = ("reconstructs",)

    def invert(self, scene: Scene) -> Inverted:
        """Begin at z*_T and keep all of z*."""
        pivots = scene.pivots(self.inversion_guidance)
        return Aligned(scene, pivots[0], source_guidance=self.inversion_guidance, pivots=pivots)
