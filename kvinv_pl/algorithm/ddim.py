"""DDIM (Song et al., 2021) without noise: the table of steps, and one move for both directions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvinv_pl.errors import UserError

Alpha: TypeAlias = float | Float[Tensor, ""] | Float[Tensor, " rows"]
"""An alpha-bar in (0, 1]: one for all rows, or one a row."""
Steps: TypeAlias = int | Int[Tensor, " rows"]
"""The number of a step, counted from noise: one for all rows, or one a row."""


@dataclass(frozen=True, eq=False)
class StepTable:
    """The T steps of a schedule, counted from noise: step i leaves alphas[i] for alphas[i + 1]."""

    timesteps: Int[Tensor, " T"]
    """The timestep that the network gets at step i; descending."""
    alphas: Float[Tensor, " T+1"]
    """alpha-bar in float64; the last one is where the last step arrives."""
    predicts_v: bool = False
    """Whether the network gives v rather than epsilon."""

    def __post_init__(self) -> None:
        """Refuse a table that cannot be walked in both directions."""
        if (self.timesteps.diff() >= 0).any():
            raise UserError(f"timesteps must descend, from noise to picture, got {self.timesteps.tolist()}")
        if self.alphas[0] == 0:
            raise UserError(
                "the schedule begins at alpha = 0 (zero terminal SNR): nothing of the picture is left there, "
                "and it cannot be predicted from epsilon; give --model.timestep_spacing leading, or if the "
                "model predicts v, --model.prediction_type v_prediction"
            )
        if not ((self.alphas > 0) & (self.alphas <= 1)).all() or (self.alphas.diff() < 0).any():
            raise UserError(
                f"alphas must rise within (0, 1] from noise to picture, got {self.alphas.tolist()}"
            )

    @classmethod
    def through(
        cls,
        timesteps: Int[Tensor, " T"],
        alphas_cumprod: Float[Tensor, " train"],
        final_alpha: Alpha,
        predicts_v: bool = False,
    ) -> StepTable:
        """The table in which every step goes to the next timestep, and the last one to final_alpha."""
        timesteps = timesteps.cpu().long()
        train = len(alphas_cumprod)
        if len(timesteps) and not 0 <= int(timesteps.min()) <= int(timesteps.max()) < train:
            raise UserError(
                f"the schedule asks for timesteps {int(timesteps.min())} to {int(timesteps.max())}, "
                f"the model knows 0 to {train - 1}; ask for fewer steps"
            )
        alphas = alphas_cumprod.cpu().double()[timesteps]
        last = torch.tensor([float(final_alpha)], dtype=torch.float64)
        return cls(timesteps, torch.cat([alphas, last]), predicts_v)

    def __len__(self) -> int:
        """T."""
        return len(self.timesteps)

    def has_effect(self, i: int) -> bool:
        """Whether epsilon matters at step i: it does not where a step arrives at the alpha it left."""
        return bool(self.alphas[i] != self.alphas[i + 1])

    def forward(
        self, z: Float[Tensor, "rows c h w"], out: Float[Tensor, "rows c h w"], i: Steps
    ) -> Float[Tensor, "rows c h w"]:
        """Step i of Eq. 4, towards the picture."""
        return move(z, self.epsilon(z, out, i), self.alphas[i], self.alphas[i + 1])

    def back(
        self, z: Float[Tensor, "rows c h w"], out: Float[Tensor, "rows c h w"], i: Steps
    ) -> Float[Tensor, "rows c h w"]:
        """Step i of Eq. 4, towards noise."""
        return move(z, self.epsilon(z, out, i), self.alphas[i + 1], self.alphas[i])

    def epsilon(
        self, z: Float[Tensor, "rows c h w"], out: Float[Tensor, "rows c h w"], i: Steps
    ) -> Float[Tensor, "rows c h w"]:
        """Epsilon from the network's output at the start of step i, whose alpha belongs to its timestep."""
        return from_v(z, out, self.alphas[i]) if self.predicts_v else out

    def noised(
        self, z_0: Float[Tensor, "rows c h w"], noise: Float[Tensor, "rows c h w"], i: Steps
    ) -> Float[Tensor, "rows c h w"]:
        """z_0 with this noise, as it is where step i begins."""
        return noised(z_0, noise, self.alphas[i])

    def predicted_z_0(
        self, z_from: Float[Tensor, "rows c h w"], z_to: Float[Tensor, "rows c h w"], i: int
    ) -> Float[Tensor, "rows c h w"]:
        """The predicted z_0 of step i, from both its ends; only where the step has an effect.

        Both are sqrt(alpha) z_0 + sqrt(1 - alpha) epsilon, each with its alpha and the same z_0 and epsilon.
        """
        a, b = float(self.alphas[i]), float(self.alphas[i + 1])
        signal_from, noise_from, signal_to, noise_to = a**0.5, (1 - a) ** 0.5, b**0.5, (1 - b) ** 0.5
        if (both := signal_from * noise_to - signal_to * noise_from) == 0:
            raise UserError(f"a step from alpha {a:g} to {b:g} carries no information about the picture")
        return (noise_to * z_from - noise_from * z_to) / both

    def record(self) -> dict[str, Any]:
        """The field "scheduler" of run.json."""
        return {
            "steps": len(self),
            "prediction": "v_prediction" if self.predicts_v else "epsilon",
            "timesteps": self.timesteps.tolist(),
            "alphas": self.alphas.tolist(),
        }


def move(
    z: Float[Tensor, "rows c h w"], eps: Float[Tensor, "rows c h w"], alpha_from: Alpha, alpha_to: Alpha
) -> Float[Tensor, "rows c h w"]:
    """Eq. 4, towards the picture or towards noise, in fp32 (float64 where z or eps is).

    The paper prints the second term without the factor sqrt(alpha_to); with it this is DDIM's own step.
    """
    dtype = torch.promote_types(torch.promote_types(z.dtype, eps.dtype), torch.float32)
    a_from, a_to = (torch.as_tensor(a, dtype=torch.float64) for a in (alpha_from, alpha_to))
    scale = (a_to / a_from).sqrt()
    along_eps = a_to.sqrt() * ((1 / a_to - 1).sqrt() - (1 / a_from - 1).sqrt())
    return _a_row(scale, z, dtype) * z.to(dtype) + _a_row(along_eps, z, dtype) * eps.to(dtype)


def from_v(
    z: Float[Tensor, "rows c h w"], v: Float[Tensor, "rows c h w"], alpha: Alpha
) -> Float[Tensor, "rows c h w"]:
    """Epsilon from a v-prediction (Salimans and Ho, 2022), alpha being z's own; in fp32 or float64."""
    dtype = torch.promote_types(torch.promote_types(z.dtype, v.dtype), torch.float32)
    a = torch.as_tensor(alpha, dtype=dtype)
    return _a_row(a.sqrt(), z, dtype) * v.to(dtype) + _a_row((1 - a).sqrt(), z, dtype) * z.to(dtype)


def noised(
    z_0: Float[Tensor, "#rows c h w"], noise: Float[Tensor, "#rows c h w"], alpha: Alpha
) -> Float[Tensor, "_ c h w"]:
    """sqrt(alpha) z_0 + sqrt(1 - alpha) noise (Ho et al., 2020, Eq. 4), in fp32 or float64."""
    dtype, a = torch.promote_types(z_0.dtype, torch.float32), torch.as_tensor(alpha)
    return _a_row(a.sqrt(), z_0, dtype) * z_0.to(dtype) + _a_row((1 - a).sqrt(), z_0, dtype) * noise.to(dtype)


def true_v(
    z_0: Float[Tensor, "#rows c h w"], noise: Float[Tensor, "#rows c h w"], alpha: Alpha
) -> Float[Tensor, "_ c h w"]:
    """The v of z_0 with this noise (Salimans and Ho, 2022): sqrt(alpha) noise - sqrt(1 - alpha) z_0."""
    return noised(noise, -z_0, alpha)


def _a_row(coefficient: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """A coefficient (one, or one a row) in a shape that multiplies z."""
    if not coefficient.ndim:  # a number on the host multiplies on any device
        return coefficient.to("cpu", dtype)
    return on_device(coefficient, dtype, z.device).reshape(-1, *[1] * (z.ndim - 1))


def on_device(values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers from the host, (rows,), on a device; not to be changed.

    A copy from the host waits for the device, and the inner steps of a phase have the same numbers: they are
    copied once.
    """
    return _copied(tuple(values.tolist()), dtype, device)


@lru_cache(maxsize=64)
def _copied(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
