"""DDIM inversion by fixed points (Pan et al., 2023, AIDI; Garibi et al., 2024, ReNoise)."""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.method import Inverted, Scene
from kvinv_pl.errors import UserError


@dataclass(eq=False)
class Solved(Inverted):
    """DDIM's steps from where the fixed points lead."""

    residuals: list[list[float]] = field(default_factory=list, repr=False)
    """Of each step, from noise: how far, root mean square, every round moved the estimate."""


@dataclass(frozen=True)
class FixedPoint:
    """DDIM inversion by fixed points (Pan et al., 2023, AIDI; Garibi et al., 2024, ReNoise, Algorithm 1).

    A step back is implicit: z_t = f(z_t), where f(z_t) goes back from z_{t-1} by the noise at z_t itself.
    DDIM inversion takes that noise at z_{t-1}; here this is the first estimate alone, and z_t <- f(z_t)
    follows so many times. At the fixed point DDIM returns to z_{t-1} exactly. The source is sampled at
    the guidance of its inversion. AIDI's acceleration is left out, and so are the averages and the noise
    correction of ReNoise, which are for models of few steps.

    Args:
        rounds: Number of iterations after DDIM's own estimate; 0 is DDIM inversion, 3 is ReNoise's for SDXL
            at 20 steps.
        inversion_guidance: Guidance scale of the source, in the inversion too; if it is large, f need not
            contract.
        guidance: Guidance scale of the target, if the edit has none of its own.
    """

    rounds: int = 3
    inversion_guidance: float = 1.0
    guidance: float = 7.5

    def __post_init__(self) -> None:
        """Refuse what is no number of rounds."""
        if self.rounds < 0:
            raise UserError(f"rounds: expected 0 or more, got {self.rounds}")

    def invert(self, scene: Scene) -> Solved:
        """Solve one step after the other, from the picture to noise."""
        eps, z = scene.eps(self.inversion_guidance), scene.z_0
        residuals: list[list[float]] = []
        for i in reversed(range(len(scene.table))):
            t, estimate = scene.table.timesteps[i : i + 1].to(z.device), z
            residuals.insert(0, [])
            for _ in range(self.rounds + 1):
                noise = scene.table.epsilon(estimate, eps(estimate, t), i)
                moved = renoised(scene, z, noise, i)
                residuals[0].append(float((moved - estimate).square().mean().sqrt()))
                estimate = moved
            z = estimate
        return Solved(scene, z, source_guidance=self.inversion_guidance, residuals=residuals)


def renoised(
    scene: Scene, z: Float[Tensor, "1 c h w"], noise: Float[Tensor, "1 c h w"], i: int
) -> Float[Tensor, "1 c h w"]:
    """DDIM's step i backwards from z, by a noise that was found elsewhere."""
    alpha, to = float(scene.table.alphas[i]), float(scene.table.alphas[i + 1])
    z_0 = (z - (1 - to) ** 0.5 * noise) / to**0.5
    return alpha**0.5 * z_0 + (1 - alpha) ** 0.5 * noise
