"""DreamBooth (Ruiz et al., 2023), by LoRA (Hu et al., 2022), of one picture."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvinv_pl.algorithm.learning import learn
from kvinv_pl.algorithm.method import Inverted, Scene
from kvinv_pl.errors import UserError

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class DreamBooth:
    """DreamBooth (Ruiz et al., 2023, Eq. 1) by LoRA (Hu et al., 2022, Eq. 3), on the one picture.

    W + B A in every projection of every attention is learned by the denoising loss of the picture under the
    source prompt; source and target are then sampled from the same noise. An identifier is a word that both
    prompts have, as in `a sks cat running`. Prior preservation is left out, since there are no pictures of
    the class. Timesteps are drawn among those of sampling.

    Args:
        rank: Of B A.
        steps: Of Adam.
        rate: Adam's, usual for LoRA.
        seed: Of A, and of the noise in learning and in sampling.
        guidance: Of the target, where the edit has none of its own.
    """

    rank: int = 4
    steps: int = 500
    rate: float = 1e-4
    seed: int = 0
    guidance: float = 7.5
    brief = {"steps": 2}  # noqa: RUF012

    def __post_init__(self) -> None:
        """Refuse to learn nothing."""
        if min(self.rank, self.steps) < 1:
            raise UserError(f"rank, steps: expected 1 or more, got {min(self.rank, self.steps)}")

    def invert(self, scene: Scene) -> Inverted:
        """Learn, and begin at noise."""
        generator = torch.Generator().manual_seed(self.seed)
        attentions = (*scene.model.self_attentions, *scene.model.cross_attentions)
        wanted = {f"{path}.{name}.weight" for path in attentions for name in PROJECTIONS}
        own = {path: weight for path, weight in scene.model.weights.items() if path in wanted}
        a = [torch.randn(self.rank, w.shape[1], generator=generator).to(w.device) for w in own.values()]
        a = [drawn / self.rank for drawn in a]
        b = [torch.zeros(w.shape[0], self.rank, device=w.device) for w in own.values()]

        def weights() -> dict[str, Tensor]:
            return {path: w + up @ down for (path, w), down, up in zip(own.items(), a, b, strict=True)}

        source = scene.contexts[1:2]
        losses = learn(scene, [*a, *b], lambda: (source, weights()), self.steps, self.rate, self.seed)
        start = torch.randn(scene.z_0.shape, generator=generator).to(scene.z_0)
        return Adapted(scene, start, weights=weights(), losses=losses)


@dataclass(eq=False)
class Adapted(Inverted):
    """DDIM's steps with the learned network."""

    losses: list[float] = field(default_factory=list, repr=False)
    """Of the steps."""
