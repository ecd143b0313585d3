"""Guidance: which branches an edit runs, and how their epsilons become one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

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
