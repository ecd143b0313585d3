"""Sampling towards the target, and nothing else."""

from dataclasses import dataclass

from kvinv_pl.algorithm.method import Control, Inverted, Scene


@dataclass(frozen=True)
class Plain:
    """DDIM (Song et al., 2021) towards the target prompt from where the inversion arrived, uncontrolled.

    Args:
        guidance: Guidance scale of the target; default: the inversion's.
        empty_source: Whether the source is inverted without its prompt.
    """

    guidance: float | None = None
    empty_source: bool = False
    properties = ("keeps equal prompts",)

    def control(self, scene: Scene, inverted: Inverted) -> Control:
        """Control nothing."""
        return Control()
