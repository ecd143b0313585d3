"""What the three stages ask of a schedule; DDIM's is in `ddim.py`, another sampler gets a file beside it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

Steps = int | Int[Tensor, " rows"]
"""The number of a step, counted from noise: one for all rows, or one a row."""


@runtime_checkable
class Schedule(Protocol):
    """T steps from noise to the picture, each of which can be gone in both directions."""

    @property
    def timesteps(self) -> Int[Tensor, " T"]:
        """What the network is told at each step; descending."""
        ...

    def __len__(self) -> int:
        """T."""
        ...

    def has_effect(self, i: int) -> bool:
        """Whether step i depends on what the network says."""
        ...

    def forward(
        self, z: Float[Tensor, "rows c h w"], out: Float[Tensor, "rows c h w"], i: Steps
    ) -> Float[Tensor, "rows c h w"]:
        """Step i, towards the picture, by the network's output at z and timesteps[i]."""
        ...

    def back(
        self, z: Float[Tensor, "rows c h w"], out: Float[Tensor, "rows c h w"], i: Steps
    ) -> Float[Tensor, "rows c h w"]:
        """Step i gone back, from z where it arrives to where it left, by the output at z and timesteps[i]."""
        ...

    def predicted_z_0(
        self, z_from: Float[Tensor, "rows c h w"], z_to: Float[Tensor, "rows c h w"], i: int
    ) -> Float[Tensor, "rows c h w"]:
        """The picture that step i believed in, from both its ends; only where it has an effect."""
        ...

    def record(self) -> dict[str, Any]:
        """What run.json says of it, as its field "scheduler"."""
        ...
