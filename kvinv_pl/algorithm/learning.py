"""What methods learn of one picture: parameters that bring its denoising loss down."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvinv_pl.algorithm.method import Inverted, Scene
from kvinv_pl.errors import UserError


@dataclass(eq=False)
class Taught(Inverted):
    """DDIM's steps with what was learned of the picture."""

    losses: Sequence[float] | Sequence[Sequence[float]] = field(default=(), repr=False)
    """Of the steps; where one thing was learned after another, of each."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """An inversion that learns the picture, and begins at noise.

    Args:
        seed: Of the noise, in learning and in sampling.
        guidance: Of the target, where the edit has none of its own.
    """

    seed: int = 0
    guidance: float = 7.5
    counts: ClassVar[tuple[str, ...]] = ()
    """Its options that are numbers of things."""
    least: ClassVar[int] = 1
    """What each of them is at least."""

    def __post_init__(self) -> None:
        """Refuse to learn less than that."""
        for name in self.counts:
            if (got := getattr(self, name)) < self.least:
                raise UserError(f"{name}: expected {self.least} or more, got {got}")

    def noise(self, scene: Scene, generator: torch.Generator | None = None) -> Float[Tensor, "1 c h w"]:
        """Where sampling begins: the seed's first draw, or the generator's next."""
        generator = generator or torch.Generator().manual_seed(self.seed)
        return torch.randn(scene.z_0.shape, generator=generator).to(scene.z_0)


def learn(
    scene: Scene,
    parameters: Sequence[Tensor],
    given: Callable[[], tuple[Tensor, Mapping[str, Tensor]]],
    steps: int,
    rate: float,
    seed: int,
    batch: int = 1,
    micro_batch: int = 1,
) -> list[float]:
    """Adam's moves on |eps - eps_theta(z_t, t, context)|^2 (Ho et al., 2020), each at a t and an eps drawn.

    Returns the loss before each move.

    Args:
        scene: The picture; t is one of the timesteps of its table.
        parameters: What is learned, in fp32.
        given: From them, anew for each forward: the context (1, L, d), and weights of the network by path.
        steps: How many moves.
        rate: Adam's.
        seed: Of what is drawn.
        batch: At how many t and eps each move looks.
        micro_batch: How many of them go through the network in one forward.
    """
    generator, losses = torch.Generator().manual_seed(seed), list[float]()
    adam = torch.optim.Adam([parameter.requires_grad_(True) for parameter in parameters], lr=rate)
    for _ in range(steps):
        adam.zero_grad()
        losses.append(0.0)
        for first in range(0, batch, micro_batch):
            rows = min(micro_batch, batch - first)
            drawn = [_draw(scene, generator) for _ in range(rows)]
            i, noise = torch.cat([each for each, _ in drawn]), torch.cat([each for _, each in drawn])
            z = scene.table.noised(scene.z_0.expand_as(noise), noise, i)
            with torch.enable_grad():
                context, weights = given()
                with scene.model.weighed(weights):
                    t = scene.table.timesteps[i].to(z.device)
                    out = scene.model.predict(z, t, context.expand(rows, -1, -1)[None])[0]
                loss = (scene.table.epsilon(z, out, i) - noise).square().mean() * rows / batch
                gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            losses[-1] += float(loss.detach())
        adam.step()
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None
    return losses


def _draw(scene: Scene, generator: torch.Generator) -> tuple[Int[Tensor, "1"], Float[Tensor, "1 c h w"]]:
    """A step of the table, and noise."""
    i = torch.randint(len(scene.table), (1,), generator=generator)
    return i, torch.randn(scene.z_0.shape, generator=generator).to(scene.z_0)
