"""The bytes of a file of tensors: its header, and its tensors as they lie there, on a device or the host."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, cast

import torch
from torch import Tensor

DTYPES = {
    **{"U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64},
    **{"F32": torch.float32, "U32": torch.uint32, "I32": torch.int32},
    **{"BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
}
"""Types of tensors as safetensors names them, in its order: each begins at a multiple of its size."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
RANK = {dtype: n for n, dtype in enumerate(DTYPES.values())}
Table = dict[str, dict[str, Any]]
"""Type, shape and place of every tensor, by its name, as in a header of safetensors."""


@dataclass(frozen=True)
class SerializedTensors:
    """Tensors one after the other, as a file has them, on their way to the host."""

    table: Table
    _data: Tensor
    _wait: Callable[[], object]

    def bytes(self) -> memoryview:
        """The bytes, once they are there."""
        self._wait()
        return memoryview(cast(Any, self._data.numpy()))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its name, once it is there."""
        self._wait()
        for name, at in self.table.items():
            yield name, view(self._data, at)


def serialize(tensors: Mapping[str, Tensor]) -> SerializedTensors:
    """The tensors, copied; those given may change afterwards. On a GPU of CUDA nothing waits for it."""
    table, parts, begin = Table(), list[Tensor](), 0
    for name in sorted(tensors, key=lambda name: (RANK[tensors[name].dtype], name)):
        tensor = tensors[name].detach()
        end = begin + tensor.nbytes
        shape = list(tensor.shape)
        table[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
        parts.append(tensor.reshape(-1).contiguous().view(torch.uint8))
        begin = end
    data = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
    return SerializedTensors(table, *to_host(data))


def to_host(data: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """A tensor on the host, and what waits until it has arrived there."""
    if data.device.type != "cuda":
        return data.cpu(), lambda: None
    host = torch.empty_like(data, device="cpu", pin_memory=True)
    host.copy_(data, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(data.device))
    return host, arrived.synchronize


def view(data: Tensor, at: Mapping[str, Any]) -> Tensor:
    """One tensor among the bytes of a file's."""
    begin, end = at["data_offsets"]
    if not math.prod(at["shape"]):
        return torch.empty(at["shape"], dtype=DTYPES[at["dtype"]], device=data.device)
    return data[begin:end].view(DTYPES[at["dtype"]]).view(at["shape"])


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    metadata: dict[str, str]
    table: Table
    end: int = 0
    """Where the tensors begin."""

    @classmethod
    def of(cls, data: bytes | memoryview) -> Header:
        """Parse the header; raises ValueError if there is none."""
        end = 8 + int.from_bytes(data[:8], "little")
        table = json.loads(bytes(data[8:end]))
        if not (isinstance(table, dict) and isinstance(metadata := table.pop("__metadata__", {}), dict)):
            raise ValueError("it has no table of tensors")
        return cls(metadata, table, end)

    def digest(self, tensors: bytes | memoryview) -> str:
        """The blake2b of the header without its digest, and of the tensors' bytes."""
        unsigned = {key: value for key, value in self.metadata.items() if key != "digest"}
        digest = blake2b(json.dumps([unsigned, self.table], sort_keys=True).encode(), digest_size=32)
        digest.update(tensors)
        return digest.hexdigest()

    def signed(self, digest: str) -> bytes:
        """The header with its digest, padded as safetensors does, so that tensors are aligned to 8 bytes."""
        table = {"__metadata__": {**self.metadata, "digest": digest}, **self.table}
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class TensorFile:
    """A file of tensors that has been read, and checked against its digest."""

    info: dict[str, Any]
    _data: Tensor
    """The tensors' bytes."""
    _table: Table

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors whose names have this prefix; views, not copies.

        safetensors' own `load` copies all of them, which takes longer than everything else in a step of an
        edit but the network.
        """
        return {name: view(self._data, at) for name, at in self._table.items() if name.startswith(prefix)}

    def on(self, device: torch.device | str) -> TensorFile:
        """The same on a device, by one copy; from pinned memory nothing waits for it."""
        return replace(self, _data=self._data.to(device, non_blocking=True))
