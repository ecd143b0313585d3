"""Null-text inversion (Mokady et al., 2023)."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.method import Inverted, Scene
from kvinv_pl.errors import UserError


@dataclass(eq=False)
class LearnedNullText(Inverted):
    """DDIM's steps, in which the unconditional branch reads what was learned for each."""

    negatives: list[Float[Tensor, "1 L d"]] = field(default_factory=list, repr=False)
    """The unconditional embedding of each step."""
    losses: list[list[float]] = field(default_factory=list, repr=False)
    """Of each step, the losses before each of Adam's moves."""
    end: Float[Tensor, "1 c h w"] | None = field(default=None, repr=False)
    """Where the source arrives."""

    def contexts(self, i: int) -> Float[Tensor, "branches 2 L d"]:
        """The learned embedding in the unconditional branch, of source and target alike."""
        given = super().contexts(i)
        return torch.stack([self.negatives[i].expand_as(given[1]), given[1]]) if len(given) == 2 else given


@dataclass(frozen=True)
class NullText:
    """Null-text inversion (Mokady et al., 2023, Algorithm 1): the unconditional embedding is learned.

    DDIM inversion at guidance 1 gives the pivots z*_t. From z*_T on, at the guidance of the edit, the
    embedding of every timestep minimises |z*_{t-1} - z_{t-1}(z_t, embedding, source)|^2, beginning with that
    of the step before; z_{t-1} by what was learned is where the next step begins. The target reads the same
    embeddings. Adam's rate is 1e-2 (1 - i / 2T), i being the step counted from noise, and a step is done
    where the mean of the squares is below tolerance + growth i.

    Args:
        inner_steps: Maximum number of Adam steps at one timestep.
        tolerance: The loss that is small enough, at the first step.
        growth: How much the tolerance grows with every step; published for 50 steps.
        guidance: Guidance scale of source and target, if the edit has none of its own; as published.
    """

    inner_steps: int = 10
    tolerance: float = 1e-5
    growth: float = 2e-5
    guidance: float = 7.5
    brief = {"inner_steps": 2}  # noqa: RUF012

    def __post_init__(self) -> None:
        """Refuse to learn nothing."""
        if self.inner_steps < 1:
            raise UserError(f"inner_steps: expected 1 or more, got {self.inner_steps}")

    def invert(self, scene: Scene) -> Inverted:
        """Begin at z*_T, with an embedding for every step; at guidance 1 none is read, and none learned."""
        pivots = scene.pivots()
        return Inverted(scene, pivots[0]) if scene.guidance == 1 else self.learn(scene, pivots)

    def learn(self, scene: Scene, pivots: Float[Tensor, "levels 1 c h w"]) -> LearnedNullText:
        """The embeddings with which the source follows the pivots, z*_T ... z*_0."""
        found = LearnedNullText(scene, pivots[0])
        empty, source = scene.contexts[:1].float(), scene.contexts[1:2]
        z, w = pivots[0], scene.guidance
        for i, pivot in enumerate(pivots[1:]):
            t = scene.table.timesteps[i : i + 1].to(z.device)
            with torch.no_grad():
                conditional = scene.model.predict(z, t, source[None])[0]

            empty = empty.detach().clone().requires_grad_(True)
            adam = torch.optim.Adam([empty], lr=1e-2 * (1 - i / (2 * len(scene.table))))
            losses: list[float] = []
            while len(losses) < self.inner_steps:
                with torch.enable_grad():
                    out = scene.model.predict(z, t, empty[None])[0]
                    moved = scene.table.forward(z, out + w * (conditional - out), i)
                    loss = (moved - pivot).square().mean()
                    (empty.grad,) = torch.autograd.grad(loss, [empty])
                adam.step()
                losses.append(float(loss.detach()))
                if losses[-1] < self.tolerance + self.growth * i:
                    break
            found.negatives.append(empty.detach().to(source))
            found.losses.append(losses)
            with torch.no_grad():
                out = scene.model.predict(z, t, torch.stack([empty.detach().to(source), source]))
                z = scene.table.forward(z, out[0] + w * (out[1] - out[0]), i)
        found.end = z
        return found
