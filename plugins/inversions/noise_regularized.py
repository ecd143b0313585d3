"""DDIM inversion whose noise is kept white (Parmar et al., 2023, pix2pix-zero)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.method import Inverted, Scene
from kvinv_pl.errors import UserError

SMALLEST = 8
"""The side at which the pyramid of the autocorrelation ends."""


@dataclass(frozen=True)
class NoiseRegularized:
    """Noise regularisation (Parmar et al., 2023, Section 3.1), the inversion of pix2pix-zero.

    The noise of every step back is moved down the gradient of two losses before the step is made: the
    pairwise loss, which is the autocorrelation at drawn shifts on all levels of a pyramid, and the divergence
    of its mean and variance from those of white noise, since noise that is white can be edited better.

    Args:
        rounds: Rounds of both losses at every step; as published; 0 is DDIM inversion.
        shifts: Shifts drawn in one round, each with its own move; as published.
        pairwise: Step size along the gradient of the pairwise loss; as published.
        divergence: Step size along the gradient of the divergence; as published.
        seed: Seed of the shifts.
        guidance: Guidance scale of the target, if the edit has none of its own; as in pix2pix-zero.
    """

    rounds: int = 5
    shifts: int = 5
    pairwise: float = 20.0
    divergence: float = 20.0
    seed: int = 0
    guidance: float = 5.0

    def __post_init__(self) -> None:
        """Refuse a negative number."""
        for name, value in (("rounds", self.rounds), ("shifts", self.shifts)):
            if value < 0:
                raise UserError(f"{name}: expected 0 or more, got {value}")

    def invert(self, scene: Scene) -> Inverted:
        """Walk back, step by step."""
        table, z, eps = scene.table, scene.z_0, scene.eps(1.0)
        generator = torch.Generator().manual_seed(self.seed)
        for i in reversed(range(len(table))):
            out = eps(z, table.timesteps[i : i + 1].to(z.device))
            noise = self.whitened(table.epsilon(z, out, i), generator)
            alpha, to = float(table.alphas[i]), float(table.alphas[i + 1])
            z_0 = (z - (1 - to) ** 0.5 * noise) / to**0.5
            z = alpha**0.5 * z_0 + (1 - alpha) ** 0.5 * noise
        return Inverted(scene, z)

    def whitened(
        self, noise: Float[Tensor, "1 c h w"], generator: torch.Generator
    ) -> Float[Tensor, "1 c h w"]:
        """The noise after all rounds."""
        for _ in range(self.rounds):
            for _ in range(self.shifts):
                moved = _gradient(lambda x: pairwise(x, generator), noise)
                noise = noise - self.pairwise / self.shifts * moved
            noise = noise - self.divergence * _gradient(divergence, noise)
        return noise


def _gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_(True)
        return torch.autograd.grad(loss(x), [x])[0]


def pairwise(noise: Float[Tensor, "1 c h w"], generator: torch.Generator) -> Float[Tensor, ""]:
    """L_pair: the squared autocorrelation of the channels at drawn shifts along both axes, on all levels."""
    found = noise.new_zeros(())
    while True:
        shortest = min(noise.shape[-2:])
        shift = int(torch.randint(1, max(2, shortest // 2), (), generator=generator))
        for axis in (-2, -1):
            found = found + (noise * noise.roll(shift, axis)).mean((0, 2, 3)).square().sum()
        if shortest <= SMALLEST:
            return found
        noise = F.avg_pool2d(noise, 2)


def divergence(noise: Float[Tensor, "1 c h w"]) -> Float[Tensor, ""]:
    """L_KL: of a normal distribution of its mean and variance from the standard one."""
    mean, variance = noise.mean(), noise.var()
    return variance + mean.square() - 1 - (variance + 1e-7).log()
