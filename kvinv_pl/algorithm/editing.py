"""Stage 3: sampling towards the target prompt under the psi of every step."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.ddim import StepTable
from kvinv_pl.algorithm.guidance import Guidance

Branches = Callable[[Tensor, Tensor], Tensor]
"""eps(z, t): every branch's output, (branches, edits, c, h, w), for latents (edits, c, h, w)."""
Alone = Callable[[Tensor, Tensor], Tensor]
"""alone(z, t): the target branch's output, (edits, c, h, w)."""
Keep = Callable[[int, Tensor], Tensor]
"""keep(i, z): the latents after step i, in which some of the source's may be put back."""
Psi = Callable[[int], AbstractContextManager[None]]
"""psi(i): the context in which the network attends with what was learned for step i."""


def first_step(start: float, steps: int) -> int:
    """The step index, counted from noise, from which CP-attn is active: round(start * T), halves upward."""
    return math.floor(start * steps + 0.5)


def edit(
    eps: Branches,
    z_T: Float[Tensor, "edits c h w"],
    table: StepTable,
    psi: Psi,
    guidance: Guidance,
    start: float,
    watch: Callable[[int], None] = lambda i: None,
    keep: Keep = lambda i, z: z,
    alone: Alone | None = None,
) -> Float[Tensor, "edits c h w"]:
    """Algorithm 1, editing: z-bar_0, from z-bar_T = z-hat_T.

    Args:
        eps: The network under the target prompts.
        z_T: The noisiest level of the trajectory, once for each target.
        table: The schedule.
        psi: What was learned; entered around the network from step round(start * T) on.
        guidance: How the branches become one epsilon.
        start: 0 (CP-attn throughout) to 1 (never).
        watch: Called with each step index, 0 ... T - 1, once its move is made.
        keep: Called after each move, with its step index and what it came to.
        alone: The network under the target prompts, called outside psi where guidance wants that as well.
    """
    z, first = z_T, first_step(start, len(table))
    for i in range(len(table)):
        t = table.timesteps[i].to(z.device).expand(len(z))
        with psi(i) if i >= first else nullcontext():
            branches = eps(z, t)
        own = alone(z, t) if alone and i >= first and guidance.reading_scale != 1 else None
        z = keep(i, table.forward(z, guidance.mix(branches, own), i))
        watch(i)
    return z
