"""How psi is tuned: all that it depends on besides the picture, the model and the sites."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.optim import Optimizer

from kvinv_pl.attention.config import of_variant
from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.data.records import of_optimizer
from kvinv_pl.data.tensors import DTYPES
from kvinv_pl.errors import UserError
from kvinv_pl.stages.curriculum import Curriculum, Pass


@dataclass(frozen=True)
class Convergence:
    """Algorithm 1's "until converged": a slot stops at a mean squared error within the step's tolerance.

    Null-text inversion (Mokady et al., 2023) lets the tolerance grow with the step: errors late in the
    process have fewer steps left to grow in.
    """

    tolerance: float
    growth: float

    def __post_init__(self) -> None:
        """Refuse bounds below zero, by the names that they have as settings."""
        for name, bound in {"tolerance": self.tolerance, "tolerance_growth": self.growth}.items():
            if not bound >= 0:
                raise UserError(f"{name}: expected a mean squared error of 0 or more, got {bound}")

    def reached(
        self, mean_errors: Float[Tensor, " slots"], steps: Int[Tensor, " slots"]
    ) -> Bool[Tensor, " slots"]:
        """Which slots may stop, each at its step, counted from noise."""
        return mean_errors <= (self.tolerance + self.growth * steps.double()).to(mean_errors)


@dataclass(frozen=True)
class TuningSettings:
    """The settings of stage 2; KVInversion's own, whose docstring says what each is."""

    guidance: float
    """w of tuning; 1 is the source prompt's branch alone."""
    negative: str
    curriculum: Curriculum
    inner_steps: int
    settle_steps: int
    convergence: Convergence
    carry: bool
    kv: str
    seed: int
    store_dtype: str

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        at_least_0("tuning_guidance", self.guidance)
        at_least_1("inner_steps", self.inner_steps)
        at_least_1("settle_steps", self.settle_steps)
        one_of("curriculum", self.curriculum, ("sequential", "pivot"))
        one_of("kv", self.kv, ("stored", "replayed"))
        one_of("store_dtype", self.store_dtype, tuple(DTYPES))

    def passes(self, learns: bool) -> tuple[Pass, ...]:
        """The passes over the timesteps, in order; a variant that learns nothing has none at the pivots."""
        return ("pivots", "roll-out") if learns and self.curriculum == "pivot" else ("roll-out",)

    def steps_at_most(self, which: Pass) -> int:
        """Optimiser steps for one timestep at most, in this pass."""
        settles = which == "roll-out" and self.curriculum == "pivot"
        return self.settle_steps if settles else self.inner_steps

    def record(
        self, cps: Sequence[CPAttention], max_grid: int | None, optimizer: Optimizer | None
    ) -> dict[str, Any]:
        """What run.json says of it, as its field "tuning".

        Args:
            cps: The variant at every site.
            max_grid: What kept sites out by their size.
            optimizer: None for a variant that learns nothing.
        """
        return {
            "guidance": self.guidance,
            "negative": self.negative if self.guidance != 1 else "",
            "attention": of_variant(cps[0]),
            "sites": [cp.site.path for cp in cps],
            "max_grid": max_grid,
            "kv": self.kv,
            "optimizer": of_optimizer(optimizer) if optimizer else None,
            "curriculum": self.curriculum,
            "inner_steps": self.inner_steps if optimizer else 0,
            "settle_steps": self.settle_steps if optimizer and self.curriculum == "pivot" else 0,
            "tolerance": [self.convergence.tolerance, self.convergence.growth],
            "carry": self.carry,
            "seed": self.seed,
            "store_dtype": self.store_dtype,
        }


def at_least_0(name: str, value: float) -> None:
    """Refuse a setting that is no finite number of 0 or more."""
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{name}: expected a finite number of 0 or more, got {value}")


def at_least_1(name: str, count: int) -> None:
    """Refuse a count below 1."""
    if count < 1:
        raise UserError(f"{name}: expected 1 or more, got {count}")


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a choice that there is not."""
    if value not in known:
        *but_last, last = known
        listed = ", ".join(known) if len(known) > 2 else f"{but_last[0]} or {last}"
        raise UserError(f"{name}: expected {listed}, got {value!r}")
