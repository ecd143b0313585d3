"""Stage 3: sampling towards the target prompt under the psi of every step, and its guidance."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.inversion import Eps
from kvinv_pl.algorithm.schedule import Schedule

Branch = Literal["negative", "source", "target"]


def branches_at(w: float) -> int:
    """How many branches classifier-free guidance runs: at w = 1 the conditional one alone counts."""
    return 1 if w == 1 else 2


def negative_at(w: float, negative: str) -> str:
    """The negative prompt as a record has it: empty where its branch does not run."""
    return negative if branches_at(w) == 2 else ""


def guided(
    eps: Sequence[Tensor] | Float[Tensor, "branches rows c h w"], scales: Sequence[float]
) -> Float[Tensor, "rows c h w"]:
    """From the first epsilon, each further one's difference from the one before it, times its scale."""
    out = eps[0]
    for before, after, scale in zip(eps, eps[1:], scales, strict=False):
        out = out + scale * (after - before)
    return out


@dataclass(frozen=True)
class Guidance:
    """eps = eps(negative) + w_s (eps(source) - eps(negative)) + w (eps(target) - eps(source)).

    At w_s = w it is classifier-free guidance (Ho and Salimans, 2022) between the negative prompt and the
    target. With a w_s of its own, the change of words is guided by w and all that both prompts say by w_s: as
    the text and the picture are apart in InstructPix2Pix (Brooks et al., 2023), Eq. 3. A branch that makes no
    difference is left out: at w_s = 1 the negative prompt, at w_s = w the source prompt, at w = w_s = 1 both.

    What is read of the source is guided as well: eps + (w_r - 1) (eps(target) - eps(target alone)), where the
    last one attends to itself, as in perturbed-attention guidance (Ahn et al., 2024), which leads away from a
    forward with worse self-attention. At w_r = 1 that one does not run.
    """

    scale: float
    source_scale: float
    reading_scale: float = 1.0

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches that run, in the order of `mix`; the target is the last."""
        negative: tuple[Branch, ...] = ("negative",) if branches_at(self.source_scale) == 2 else ()
        if self.source_scale == self.scale:
            return (*negative, "target")
        return (*negative, "source", "target")

    def mix(
        self, eps: Float[Tensor, "branches rows c h w"], alone: Float[Tensor, "rows c h w"] | None = None
    ) -> Float[Tensor, "rows c h w"]:
        """One epsilon of those of `branches`, and of the target's that attends to itself if that is known."""
        out = guided(eps, (self.source_scale, self.scale) if len(eps) == 3 else (self.scale,))
        return out if alone is None else out + (self.reading_scale - 1) * (eps[-1] - alone)


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
