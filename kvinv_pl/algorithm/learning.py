"""What methods learn of one picture: parameters that bring its denoising loss down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kvinv_pl.algorithm.method import Scene
from kvinv_pl.algorithm.words import common_subject
from kvinv_pl.errors import UserError

Given = Callable[[], tuple[Tensor, Mapping[str, Tensor]]]


def subject(scene: Scene, word: str) -> str:
    """The word for what an edit keeps: the one given, or else `common_subject`'s; a UserError without any."""
    found = word or common_subject(scene.source, scene.target)
    if found is None:
        raise UserError(
            f"which word of {scene.target!r} is the subject cannot be told from the source prompt "
            f"{scene.source!r}: give it by the method's option word"
        )
    return found


def learn(
    scene: Scene,
    parameters: Sequence[Tensor],
    given: Given,
    steps: int,
    rate: float,
    seed: int,
    batch: int = 1,
) -> list[float]:
    """Adam's moves on |eps - eps_theta(z_t, t, context)|^2 (Ho et al., 2020), each at a t and an eps drawn.

    Returns the loss before each move.

    Args:
        scene: The picture; t is one of the timesteps of its table.
        parameters: What is learned, in fp32.
        given: From them, anew for each move: the context (1, L, d), and weights of the network by path.
        steps: How many moves.
        rate: Adam's.
        seed: Of what is drawn.
        batch: At how many t and eps each move looks, one after another.
    """
    generator, losses = torch.Generator().manual_seed(seed), list[float]()
    adam = torch.optim.Adam([parameter.requires_grad_(True) for parameter in parameters], lr=rate)
    for _ in range(steps):
        adam.zero_grad()
        losses.append(0.0)
        for _ in range(batch):
            i = int(torch.randint(len(scene.table), (), generator=generator))
            noise = torch.randn(scene.z_0.shape, generator=generator).to(scene.z_0)
            alpha = float(scene.table.alphas[i])
            z = alpha**0.5 * scene.z_0 + (1 - alpha) ** 0.5 * noise
            with torch.enable_grad():
                context, weights = given()
                with scene.model.weighed(weights):
                    t = scene.table.timesteps[i : i + 1].to(z.device)
                    out = scene.model.predict(z, t, context[None])[0]
                loss = (scene.table.epsilon(z, out, i) - noise).square().mean() / batch
                gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            losses[-1] += float(loss.detach())
        adam.step()
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None
    return losses
