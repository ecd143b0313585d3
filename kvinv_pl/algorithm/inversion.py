"""Stage 1: the pivot trajectory of a picture, by DDIM run backwards."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.schedule import Schedule

Eps = Callable[[Tensor, Tensor], Tensor]
"""eps(z, t): what the network gives for latents (slots, c, h, w) at timesteps (slots,)."""


def invert(
    eps: Eps,
    z_0: Float[Tensor, "slots c h w"],
    table: Schedule,
    watch: Callable[[int], None] = lambda i: None,
) -> Float[Tensor, "levels slots c h w"]:
    """Algorithm 1, inversion: z-hat_0 ... z-hat_T, with epsilon taken at the noisier end of each move.

    Args:
        eps: The network, guided or not; z-hat is what it is to reproduce.
        z_0: Encode(I_s).
        table: The schedule.
        watch: Called with each step index, T - 1 ... 0, once its move is made.
    """
    z = [z_0]
    for i in reversed(range(len(table))):
        t = table.timesteps[i].to(z_0.device).expand(len(z_0))
        z.append(table.back(z[-1], eps(z[-1], t), i))
        watch(i)
    return torch.stack(z)
