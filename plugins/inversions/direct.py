"""Direct inversion (Ju et al., 2024, PnP Inversion)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.method import Inverted, Scene


@dataclass(eq=False)
class Corrected(Inverted):
    """DDIM's steps, with the source put back to its trajectory after each."""

    pivots: Float[Tensor, "levels 1 c h w"] | None = None

    def step(
        self, i: int, z: Float[Tensor, "2 c h w"], out: Float[Tensor, "2 c h w"]
    ) -> Float[Tensor, "2 c h w"]:
        """z-hat_{t-1} for the source: its own step and the offset to there; the target's step alone."""
        moved = super().step(i, z, out)
        if self.pivots is not None:
            moved[:1] = self.pivots[i + 1]
        return moved


@dataclass(frozen=True)
class Direct:
    """Direct inversion (Ju et al., 2024, Algorithm 1): the source's branch alone is corrected.

    DDIM inversion at guidance 1 gives z*_t. In sampling, o_{t-1} = z*_{t-1} - DDIM(z_t) is added to
    the source alone, which is therefore exactly z*_{t-1} after every step, at any guidance.

    Args:
        guidance: Guidance scale of the target, if the edit has none of its own; as published.
    """

    guidance: float = 7.5
    properties = ("reconstructs",)

    def invert(self, scene: Scene) -> Inverted:
        """Begin at z*_T and keep all of z*."""
        pivots = scene.pivots()
        return Corrected(scene, pivots[0], pivots=pivots)
