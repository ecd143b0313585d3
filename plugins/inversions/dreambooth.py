"""DreamBooth (Ruiz et al., 2023), by LoRA (Hu et al., 2022), of one picture."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvinv_pl.algorithm.learning import Learning, Taught, learn
from kvinv_pl.algorithm.method import Scene

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class DreamBooth(Learning):
    """DreamBooth (Ruiz et al., 2023, Eq. 1) by LoRA (Hu et al., 2022, Eq. 3), on the one picture.

    W + B A in every projection of every attention is learned by the denoising loss of the picture under the
    source prompt; source and target are then sampled from the same noise. An identifier is a word that both
    prompts have, as in `a sks cat running`. Prior preservation is left out, since there are no pictures of
    the class. Timesteps are drawn among those of sampling. Rank, steps and rate are those of the example in
    diffusers.

    Args:
        rank: Rank of B A.
        steps: Number of Adam steps.
        rate: Adam's learning rate.
        seed: Seed of A, and of the noise in learning and sampling.
    """

    rank: int = 4
    steps: int = 500
    rate: float = 1e-4
    counts = ("rank", "steps")
    brief = {"steps": 2}  # noqa: RUF012

    def invert(self, scene: Scene) -> Taught:
        """Learn, and begin at noise."""
        generator = torch.Generator().manual_seed(self.seed)
        attentions = (*scene.model.self_attentions, *scene.model.cross_attentions)
        wanted = {f"{path}.{name}.weight" for path in attentions for name in PROJECTIONS}
        base = {path: weight for path, weight in scene.model.weights.items() if path in wanted}
        a = [torch.randn(self.rank, w.shape[1], generator=generator).to(w.device) for w in base.values()]
        a = [drawn / self.rank for drawn in a]
        b = [torch.zeros(w.shape[0], self.rank, device=w.device) for w in base.values()]

        def weights() -> dict[str, Tensor]:
            return {path: w + up @ down for (path, w), down, up in zip(base.items(), a, b, strict=True)}

        source = scene.contexts[1:2]
        losses = learn(scene, [*a, *b], lambda: (source, weights()), self.steps, self.rate, self.seed)
        return Taught(scene, self.noise(scene, generator), weights=weights(), losses=losses)
