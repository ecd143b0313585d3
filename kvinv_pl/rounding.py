"""How psi, K-bar and V-bar are kept: in a floating dtype, or in int8 with a scale for each channel."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.errors import UserError

StoreDtype = Literal["float16", "bfloat16", "float32", "int8"]
"""The names that `store_dtype` may have."""
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(StoreDtype)}
LEVELS = 127
SCALE = "#scale"
"""The end of the name under which the scales of an int8 tensor lie beside it."""


def rounded(x: Float[Tensor, "*rows tokens dim"], dtype: str) -> Float[Tensor, "*rows tokens dim"]:
    """What comes back of x once it has been stored; rounding again changes nothing."""
    return unpacked(packed("x", x, dtype), "x").to(x.dtype)


def packed(name: str, x: Float[Tensor, "*rows tokens dim"], dtype: str) -> dict[str, Tensor]:
    """What is stored for x: one tensor, or for int8 two, the integers and their scales, (*rows, 1, dim).

    What has a single token (lambda and gamma) is next to nothing, and stays in fp32 where the rest is int8.
    Integers stay as they are; raises UserError for what is too large for a floating dtype.
    """
    if not x.is_floating_point():
        return {name: x}
    if dtype != "int8":
        stored = x.to(DTYPES[dtype])
        if x.isfinite().all() and not stored.isfinite().all():
            raise UserError(
                f"{name}: expected values within {torch.finfo(DTYPES[dtype]).max:g}, the most that "
                f"store_dtype {dtype} holds, got up to {float(x.abs().max()):g}; "
                "use store_dtype bfloat16 or float32"
            )
        return {name: stored}
    if x.ndim < 2 or x.shape[-2] == 1:
        return {name: x.float()}
    scale = _short(x.float().abs().amax(-2, keepdim=True) / LEVELS)
    levels = torch.where(scale > 0, x.float() / scale, 0).round()
    return {name: levels.to(torch.int8), name + SCALE: scale}


def stored_bytes(x: Float[Tensor, "*rows tokens dim"], dtype: str) -> int:
    """How many bytes x takes where it is stored, its scales too."""
    return sum(stored.nbytes for stored in packed("x", x, dtype).values())


def unpacked(stored: dict[str, Tensor], name: str) -> Tensor:
    """The tensor that was stored under `name`; int8 becomes fp32."""
    return stored[name] * stored[name + SCALE] if name + SCALE in stored else stored[name]


def _short(scale: Tensor) -> Tensor:
    """The scale with 16 binary digits, upward: multiples of it up to 127 are then exact in fp32."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2**16).ceil() / 2**16, exponent)
