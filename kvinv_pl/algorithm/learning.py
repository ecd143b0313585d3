"""What methods learn of one picture: parameters that bring its denoising loss down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kvinv_pl.algorithm.method import Scene

Given = Callable[[], tuple[Tensor, Mapping[str, Tensor]]]


def learn(
    scene: Scene, parameters: Sequence[Tensor], given: Given, steps: int, rate: float, seed: int
) -> list[float]:
    """Adam's moves on |eps - eps_theta(z_t, t, context)|^2 (Ho et al., 2020), each at a t and an eps drawn.

    Args:
        scene: The picture; t is one of the timesteps of its table.
        parameters: What is learned, in fp32.
        given: From them, anew for each move: the context (1, L, d), and weights of the network by path.
        steps: How many moves.
        rate: Adam's.
        seed: Of what is drawn.
    """
    generator, losses = torch.Generator().manual_seed(seed), list[float]()
    adam = torch.optim.Adam([parameter.requires_grad_(True) for parameter in parameters], lr=rate)
    for _ in range(steps):
        i = int(torch.randint(len(scene.table), (), generator=generator))
        noise = torch.randn(scene.z_0.shape, generator=generator).to(scene.z_0)
        alpha = float(scene.table.alphas[i])
        z = alpha**0.5 * scene.z_0 + (1 - alpha) ** 0.5 * noise
        with torch.enable_grad():
            context, weights = given()
            with scene.model.weighed(weights):
                out = scene.model.predict(z, scene.table.timesteps[i : i + 1].to(z.device), context[None])[0]
            loss = (scene.table.epsilon(z, out, i) - noise).square().mean()
            gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        losses.append(float(loss.detach()))
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None
    return losses
