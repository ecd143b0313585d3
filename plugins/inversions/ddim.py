"""DDIM inversion (Song et al., 2021)."""

from dataclasses import dataclass

from kvinv_pl.algorithm.method import Inverted, Scene


@dataclass(frozen=True)
class DDIM:
    """DDIM run backwards (Song et al., 2021, Eq. 14), and forwards again at the edit's guidance.

    The noise of a step is taken at its clean end in place of its noisy one, so that the way back drifts; at
    an edit's guidance other than the inversion's, source and reconstruction are further apart still.

    Args:
        inversion_guidance: The guidance scale of the inversion; the paper's own has none, which is 1.
        guidance: Guidance scale of the target, if the edit has none of its own.
    """

    inversion_guidance: float = 1.0
    guidance: float = 7.5

    def invert(self, scene: Scene) -> Inverted:
        """Begin at z-hat_T."""
        return Inverted(scene, scene.pivots(self.inversion_guidance)[0])
