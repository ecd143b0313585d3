"""Null-text inversion (Mokady et al., 2023), the published recipe: what a reconstruction costs without psi.

The embedding of the empty prompt is learned for every timestep, beginning with that of the step before, by
Adam with the rate 1e-2 (1 - i/100), for at most 10 steps, until the mean squared error is below
1e-5 + 2e-5 i, i being the step counted from noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvinv_pl.algorithm.guidance import guided
from kvinv_pl.models.denoiser import Denoiser


def reconstruct(
    denoiser: Denoiser, trajectory: Tensor, contexts: Tensor, w: float, inner_steps: int = 10
) -> tuple[Tensor, list[int]]:
    """z-tilde_0 of one picture, and the steps that each timestep took.

    Args:
        denoiser: The model, without CP-attn in use.
        trajectory: z-hat_0 ... z-hat_T, (T + 1, 1, c, h, w).
        contexts: The empty prompt's embedding and the source's, (2, 1, L, d).
        w: The guidance scale.
        inner_steps: Adam steps for one timestep at most; the recipe's own are 10.
    """
    table, eps = denoiser.table, denoiser.backbone.predict
    z, empty, source = trajectory[-1], contexts[0], contexts[1]
    used: list[int] = []
    for i in range(len(table)):
        t, pivot = table.timesteps[i : i + 1].to(z.device), trajectory[len(table) - 1 - i]
        with torch.no_grad():
            eps_c = eps(z, t, source)
        empty = empty.detach().clone().requires_grad_(True)
        adam = torch.optim.Adam([empty], lr=1e-2 * (1 - i / 100))
        used.append(0)
        for _ in range(inner_steps):
            used[-1] += 1
            here = table.forward(z, guided((eps(z, t, empty), eps_c), (w,)), i)
            loss = (here - pivot).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            if float(loss.detach()) < 1e-5 + 2e-5 * i:
                break
        with torch.no_grad():
            both = eps(torch.cat([z, z]), t.repeat(2), torch.cat([empty, source]))
            z = table.forward(z, guided(both.split(1), (w,)), i)
    return z, used
