"""The tensors of a finished phase: psi_t, z-tilde and, if stored, K-bar and V-bar, in one file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.data.runs.layout import TensorFile
from kvinv_pl.errors import UserError

StoreDtype = Literal["float16", "bfloat16", "float32", "int8"]
"""The names that `store_dtype` may have."""
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(StoreDtype)}
LEVELS = 127
SCALE = "#scale"
"""The suffix of the name of an int8 tensor's scales."""


def rounded(x: Float[Tensor, "*shape"], dtype: str) -> Float[Tensor, "*shape"]:
    """X as it is read back after being stored; rounding twice changes nothing."""
    return dequantized(quantized("x", x, dtype), "x").to(x.dtype)


def quantized(name: str, x: Float[Tensor, "*shape"], dtype: str) -> dict[str, Tensor]:
    """What is stored for x: one tensor, or for int8 two, the integers and their scales, (*rows, 1, dim).

    Its last axes are tokens and channels. What has a single token (lambda and gamma), or no such axes, is
    next to nothing, and stays in fp32 where the rest is int8. Integers stay as they are. What is
    too large for a floating dtype becomes infinite: see `overflowing_rows`.
    """
    if not x.is_floating_point():
        return {name: x}
    if dtype != "int8":
        return {name: x.to(DTYPES[dtype])}
    if x.ndim < 2 or x.shape[-2] == 1:
        return {name: x.float()}
    scale = _short(x.float().abs().amax(-2, keepdim=True) / LEVELS)
    levels = torch.where(scale > 0, x.float() / scale, 0).round()
    return {name: levels.to(torch.int8), name + SCALE: scale}


def overflowing_rows(named: Mapping[str, Tensor], dtype: str) -> dict[int, str]:
    """The rows in which something is finite and too large for a floating dtype, each with an error message.

    There is one wait for the device; none for int8, which holds everything, nor for float32 in float32.
    """
    if dtype == "int8":
        return {}
    most = torch.finfo(DTYPES[dtype]).max
    values = {
        name: x
        for name, x in named.items()
        if x.is_floating_point() and x.numel() and torch.finfo(x.dtype).max > most
    }
    if not values:
        return {}
    overflows = [
        (x.isfinite() & ~x.to(DTYPES[dtype]).isfinite()).reshape(len(x), -1).any(1) for x in values.values()
    ]
    messages = dict[int, str]()
    for of_rows, (name, x) in zip(torch.stack(overflows).tolist(), values.items(), strict=True):
        for row, overflowed in enumerate(of_rows):
            if overflowed and row not in messages:
                messages[row] = (
                    f"{name}: expected values within {most:g}, the most that "
                    f"store_dtype {dtype} can hold, got up to {float(x[row].abs().max()):g}; "
                    "use store_dtype bfloat16 or float32"
                )
    return messages


def stored_bytes(x: Float[Tensor, "*shape"], dtype: str) -> int:
    """The bytes of x as `quantized` stores it, with its scales; from its shape and type alone."""
    return sum(stored.nbytes for stored in quantized("x", x.to("meta"), dtype).values())


def dequantized(stored: dict[str, Tensor], name: str) -> Tensor:
    """The tensor that was stored under `name`; int8 becomes fp32."""
    return stored[name] * stored[name + SCALE] if name + SCALE in stored else stored[name]


def _short(scale: Tensor) -> Tensor:
    """The scale with 16 binary digits, upward: multiples of it up to 127 are then exact in fp32.

    By the bits, because Apple's GPUs have no frexp: 8 of the 24 digits of a positive number are dropped.
    """
    upward = ((scale.view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32)
    return torch.where(scale.isfinite(), upward, scale)


Bars = tuple[Tensor, Tensor]
"""K-bar and V-bar of one self-attention, each (1 or 2 branches, tokens, dim)."""


class Step:
    """A finished phase that was read and checked; its tensors are made on first use.

    Making them takes many small operations, which in another thread would block this one for longer than
    they take.
    """

    def __init__(self, packed: TensorFile) -> None:
        self.info: dict[str, Any] = packed.info
        """The figures of the phase."""
        self._packed = packed

    @cached_property
    def z(self) -> Float[Tensor, "c h w"]:
        """Z-tilde after the step, in fp32."""
        return self._packed.tensors("z")["z"]

    @cached_property
    def psi(self) -> dict[str, Tensor]:
        """Psi_t by "path.name", without the slot axis."""
        return {
            name.removeprefix("psi."): value for name, value in unpack(self._packed.tensors("psi.")).items()
        }

    @cached_property
    def kv(self) -> dict[str, Bars] | None:
        """K-bar and V-bar by site path; None if they are not stored."""
        values = unpack(self._packed.tensors("kv."))
        paths = sorted({name.removeprefix("kv.")[: -len(".k")] for name in values})
        return {path: (values[f"kv.{path}.k"], values[f"kv.{path}.v"]) for path in paths} or None

    def on(self, device: torch.device | str) -> Step:
        """The same on a device, to which the file is copied at once and as it is on disk."""
        return Step(self._packed.on(device))


def step_tensors(
    psi: Mapping[str, Tensor], z: Float[Tensor, "c h w"], kv: Mapping[str, Bars] | None, dtype: str | None
) -> dict[str, Tensor]:
    """The tensors of a phase's file.

    Args:
        psi: Psi_t by "path.name".
        z: Z-tilde after the step, which is kept in fp32.
        kv: K-bar and V-bar by site path; None: they are not stored.
        dtype: What psi, K-bar and V-bar are rounded to; None: they are kept as they are.
    """
    named = {f"psi.{name}": value for name, value in psi.items()}
    for path, (k, v) in (kv or {}).items():
        named |= {f"kv.{path}.k": k, f"kv.{path}.v": v}
    return {"z": z.float(), **pack(named, dtype)}


def pack(values: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """Tensors by name as they are stored, rounded to `dtype`, if one is given and can hold them."""
    if dtype and (errors := overflowing_rows({name: x[None] for name, x in values.items()}, dtype)):
        raise UserError(errors[0])
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        tensors |= quantized(name, value, dtype) if dtype else {name: value}
    return tensors


def unpack(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that were given to be stored; what was rounded to int8 comes back in fp32."""
    names = [name for name in stored if not name.endswith(SCALE)]
    return {name: dequantized(stored, name) for name in names}
