"""A callback of diffusers as a Watch has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from kvinv_pl.errors import UserError

GIVEN = ("latents",)
"""Which tensors a callback may ask for."""


def as_after_step(
    pipe: Any, callback: Callable[..., dict[str, Any]] | None, inputs: Sequence[str]
) -> Callable[[int, int, Tensor], Tensor | None] | None:
    """What is called after each step with its index, its timestep and the latents, and may return others.

    A PipelineCallback names its inputs itself.
    """
    if callback is None:
        return None
    inputs = getattr(callback, "tensor_inputs", inputs)
    if unknown := [name for name in inputs if name not in GIVEN]:
        raise UserError(f"callback_on_step_end_tensor_inputs: expected latents, got {unknown[0]!r}")

    def after_step(i: int, t: int, z: Tensor) -> Tensor | None:
        returned = callback(pipe, i, t, {"latents": z} if "latents" in inputs else {})
        return (returned or {}).get("latents")

    return after_step
