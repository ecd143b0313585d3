"""Imagic (Kawar et al., 2023)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvinv_pl.algorithm.learning import Learning, Taught, learn
from kvinv_pl.algorithm.method import Scene


@dataclass(frozen=True)
class Imagic(Learning):
    """Imagic (Kawar et al., 2023, Section 3.2): an embedding, then the network, are learned of the picture.

    (A) The target's embedding is optimised into e_opt by the denoising loss of the picture (Eq. 2). (B) All
    weights of the U-Net are, with e_opt held. (C) The target reads e = eta e_tgt + (1 - eta) e_opt (Eq. 3),
    and the source e_opt, both from the same noise. Timesteps are drawn among those of sampling. Steps and
    rates are the paper's of Stable Diffusion (Section 4); diffusers' community pipeline has 500 and 1,000 at
    1e-3 and 2e-6. The network needs room for its weights four times, in fp32.

    Args:
        eta: How much of the target's own embedding; published: .6 to .8.
        text_steps: Number of Adam steps for the embedding.
        text_rate: Learning rate for the embedding.
        network_steps: Number of Adam steps for the network.
        network_rate: Learning rate for the network.
    """

    eta: float = 0.7
    text_steps: int = 1000
    text_rate: float = 2e-3
    network_steps: int = 1500
    network_rate: float = 5e-7
    counts, least = ("text_steps", "network_steps"), 0
    brief = {"text_steps": 2, "network_steps": 2}  # noqa: RUF012

    def invert(self, scene: Scene) -> Taught:
        """Learn, and begin at noise."""
        target = scene.contexts[2:]
        found = target.float().clone()
        text = learn(scene, [found], lambda: (found, {}), self.text_steps, self.text_rate, self.seed)
        weights, network = dict[str, Tensor](), list[float]()
        if self.network_steps:
            weights = {path: value.detach().float().clone() for path, value in scene.model.weights.items()}
            every, rate, seed = [*weights.values()], self.network_rate, self.seed + 1
            network = learn(scene, every, lambda: (found, weights), self.network_steps, rate, seed)
        read = torch.cat([found, self.eta * target + (1 - self.eta) * found]).to(target)
        return Taught(scene, self.noise(scene), weights=weights, read=read, losses=(text, network))
