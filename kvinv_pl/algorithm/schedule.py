"""The interface of a schedule; `ddim.py` has DDIM's, and another sampler gets its own file."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Schedule(Protocol):
    """T steps from noise to the picture, each of which can be made in both directions."""

    @property
    def timesteps(self) -> Int[Tensor, " T"]:
        """The timestep that the network gets at each step; descending."""
        ...

    def __len__(self) -> int:
        """T."""
        ...

    def has_effect(self, i: int) -> bool:
        """Whether step i depends on the network's output."""
        ...

    def forward(
        self, z: Float[Tensor, "rows c h w"], out: Float[Tensor, "rows c h w"], i: int | Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows c h w"]:
        """Step i, towards the picture, by the network's output at z and timesteps[i]."""
        ...

    def back(
        self, z: Float[Tensor, "rows c h w"], out: Float[Tensor, "rows c h w"], i: int | Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows c h w"]:
        """Step i backwards, from z where it arrives to where it left, by the output at z and timesteps[i]."""
        ...

    def noised(
        self,
        z_0: Float[Tensor, "rows c h w"],
        noise: Float[Tensor, "rows c h w"],
        i: int | Int[Tensor, " rows"],
    ) -> Float[Tensor, "rows c h w"]:
        """z_0 with this noise, as it is where step i begins."""
        ...

    def predicted_z_0(
        self, z_from: Float[Tensor, "rows c h w"], z_to: Float[Tensor, "rows c h w"], i: int
    ) -> Float[Tensor, "rows c h w"]:
        """The predicted z_0 of step i, from both its ends; only where the step has an effect."""
        ...

    def record(self) -> dict[str, Any]:
        """The field "scheduler" of run.json."""
        ...
