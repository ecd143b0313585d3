"""Edit-friendly DDPM inversion (Huberman-Spiegelglas et al., 2024)."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.method import Inverted, Scene
from kvinv_pl.errors import UserError


@dataclass(eq=False)
class Noised(Inverted):
    """DDPM's steps with the noise that was found for the source, in both rows."""

    noise: list[Float[Tensor, "1 c h w"]] = field(default_factory=list, repr=False)
    """sigma_t z_t of each step from `first` on."""

    def step(
        self, i: int, z: Float[Tensor, "2 c h w"], out: Float[Tensor, "2 c h w"]
    ) -> Float[Tensor, "2 c h w"]:
        """x_{t-1} = mu_t(x_t) + sigma_t z_t."""
        return mean(self.scene, z, out, i) + self.noise[i - self.first]


@dataclass(frozen=True)
class EditFriendly:
    """Edit-friendly DDPM inversion (Huberman-Spiegelglas et al., 2024, Algorithm 1).

    Every x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) eps~_t has its own noise (Eq. 6), and the noise maps
    z_t = (x_{t-1} - mu_t(x_t)) / sigma_t (Eq. 5) are those with which DDPM gives the picture back. The target
    is sampled with the same ones. sigma_t z_t is kept for the last step as well, where the authors' code
    drops it and the paper does not.

    Args:
        skip: The share of the steps, from noise, that are left out; published: 36 of 100.
        source_guidance: Guidance scale of the source, in the inversion too.
        seed: Seed of eps~.
        guidance: Guidance scale of the target, if the edit has none of its own; as published.
    """

    skip: float = 0.36
    source_guidance: float = 3.5
    seed: int = 0
    guidance: float = 15.0
    properties = ("reconstructs",)

    def __post_init__(self) -> None:
        """Refuse to leave out everything."""
        if not 0 <= self.skip < 1:
            raise UserError(f"skip: expected 0 to less than 1, got {self.skip}")

    def invert(self, scene: Scene) -> Inverted:
        """Draw the x_t, and find the noise of each step."""
        steps, z_0, eps = len(scene.table), scene.z_0, scene.eps(self.source_guidance)
        generator = torch.Generator().manual_seed(self.seed)
        levels: list[Tensor] = []
        for alpha in scene.table.alphas[:-1].tolist():
            drawn = torch.randn(z_0.shape, generator=generator).to(z_0)
            levels.append(alpha**0.5 * z_0 + (1 - alpha) ** 0.5 * drawn)
        levels.append(z_0)
        first = min(int(self.skip * steps + 0.5), steps - 1)
        noise: list[Tensor] = []
        z = levels[first]
        for i in range(first, steps):
            t = scene.table.timesteps[i : i + 1].to(z.device)
            mu = mean(scene, z, eps(z, t), i)
            noise.append(levels[i + 1] - mu)
            z = mu + noise[-1]  # as sampling will round it
        return Noised(scene, levels[first], first, self.source_guidance, noise=noise)


def mean(
    scene: Scene, z: Float[Tensor, "rows c h w"], out: Float[Tensor, "rows c h w"], i: int
) -> Float[Tensor, "rows c h w"]:
    """mu_t(x_t) of DDPM: DDIM's step with eta = 1, without its noise."""
    alpha, to = float(scene.table.alphas[i]), float(scene.table.alphas[i + 1])
    eps = scene.table.epsilon(z, out, i)
    x_0 = (z - (1 - alpha) ** 0.5 * eps) / alpha**0.5
    variance = (1 - to) / (1 - alpha) * (1 - alpha / to)
    return to**0.5 * x_0 + max(1 - to - variance, 0.0) ** 0.5 * eps
