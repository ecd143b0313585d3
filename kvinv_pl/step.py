"""What a finished phase leaves: psi_t, z-tilde and, if stored, K-bar and V-bar, as tensors of one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvinv_pl import rounding
from kvinv_pl.files import Packed

Bars = tuple[Tensor, Tensor]
"""K-bar and V-bar of one self-attention, each (1 or 2 branches, tokens, dim)."""


class Step:
    """A finished phase that was read and checked; tensors are made of it where they are first asked for.

    To make them takes many small operations, which in a thread of their own would hold up the others for
    longer than they take.
    """

    def __init__(self, packed: Packed) -> None:
        """Take a phase's file."""
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
            name.removeprefix("psi."): value for name, value in unpacked(self._packed.tensors("psi.")).items()
        }

    @cached_property
    def kv(self) -> dict[str, Bars] | None:
        """K-bar and V-bar by site path; None if they are not stored."""
        return self.kv_on("cpu")

    def kv_on(self, device: torch.device | str) -> dict[str, Bars] | None:
        """K-bar and V-bar by site path, on a device, where they come in the bytes that they have on disk."""
        values = unpacked({name: value.to(device) for name, value in self._packed.tensors("kv.").items()})
        paths = sorted({name.removeprefix("kv.")[: -len(".k")] for name in values})
        return {path: (values[f"kv.{path}.k"], values[f"kv.{path}.v"]) for path in paths} or None


def of_step(
    psi: Mapping[str, Tensor], z: Float[Tensor, "c h w"], kv: Mapping[str, Bars] | None, dtype: str | None
) -> dict[str, Tensor]:
    """The tensors of a phase's file.

    Args:
        psi: Psi_t by "path.name".
        z: Z-tilde after the step, which is kept in fp32.
        kv: K-bar and V-bar by site path; None: they are not stored.
        dtype: What psi, K-bar and V-bar are rounded to; None: they are kept as they are.
    """
    given = {f"kv.{path}.{key}": bar for path, bars in (kv or {}).items() for key, bar in _named(bars)}
    named = {f"psi.{name}": value for name, value in psi.items()}
    return {"z": z.float(), **packed(named, dtype), **packed(given, dtype)}


def packed(given: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """Tensors by name as they are stored, rounded to `dtype`, if one is given."""
    tensors: dict[str, Tensor] = {}
    for name, value in given.items():
        tensors |= rounding.packed(name, value, dtype) if dtype else {name: value}
    return tensors


def unpacked(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that were given to be stored; what was rounded to int8 comes back in fp32."""
    names = [name for name in stored if not name.endswith(rounding.SCALE)]
    return {name: rounding.unpacked(stored, name) for name in names}


def _named(bars: Bars) -> Iterator[tuple[str, Tensor]]:
    yield from zip("kv", bars, strict=True)
