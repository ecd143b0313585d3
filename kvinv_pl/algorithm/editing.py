"""Stage 3: sampling towards the target prompt under the psi of every step."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.guidance import Guidance
from kvinv_pl.algorithm.inversion import Eps
from kvinv_pl.algorithm.schedule import Schedule


def first_step(start: float, steps: int) -> int:
    """The step index, counted from noise, from which CP-attn is active: round(start * T), halves upward."""
    return math.floor(start * steps + 0.5)


def edit(
    eps: Eps,
    z_T: Float[Tensor, "edits c h w"],
    table: Schedule,
    psi: Callable[[int], AbstractContextManager[None]],
    guidance: Guidance,
    start: float,
    after: Callable[[int, Tensor], Tensor] = lambda i, z: z,
    alone: Eps | None = None,
) -> Float[Tensor, "edits c h w"]:
    """Algorithm 1, editing: z-bar_0, from z-bar_T = z-hat_T.

    Args:
        eps: The network under the target prompts: the output of every branch, (branches, edits, c, h, w).
        z_T: The noisiest level of the trajectory, once for each target.
        table: The schedule.
        psi: The context of what was learned for a step; entered around the network from round(start * T) on.
        guidance: How the branches become one epsilon.
        start: 0 (CP-attn throughout) to 1 (never).
        after: Given each step index, 0 ... T - 1, and the latents after its move; returns what to go on with.
        alone: The target branch's output, (edits, c, h, w), outside psi, where guidance wants that as well.
    """
    z, first = z_T, first_step(start, len(table))
    for i in range(len(table)):
        t = table.timesteps[i].to(z.device).expand(len(z))
        with psi(i) if i >= first else nullcontext():
            branches = eps(z, t)
        own = alone(z, t) if alone and i >= first and guidance.reading_scale != 1 else None
        z = after(i, table.forward(z, guidance.mix(branches, own), i))
    return z
