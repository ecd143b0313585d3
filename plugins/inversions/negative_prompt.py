"""Negative-prompt inversion (Miyake et al., 2023)."""

from dataclasses import dataclass

from kvinv_pl.algorithm.method import Inverted, Scene


@dataclass(frozen=True)
class NegativePrompt:
    """Negative-prompt inversion (Miyake et al., 2023): the source prompt in the place of the empty one.

    Null-text inversion's optimum is close to the source prompt's own embedding, which needs no training:
    eps = eps(source) + w (eps(prompt) - eps(source)). With the source prompt itself, both terms are equal at
    any w, and the reconstruction is DDIM's at guidance 1, at which the inversion ran.

    Args:
        guidance: Guidance scale of the target, if the edit has none of its own; as published.
    """

    guidance: float = 7.5

    def invert(self, scene: Scene) -> Inverted:
        """Begin at z-hat_T, with the source prompt as the negative one."""
        return Inverted(scene, scene.pivots()[0], negative=scene.contexts[1:2])
