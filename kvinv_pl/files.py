"""The files of a run: written as a whole or not at all, checked when read, and never pickled."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from kvinv_pl.errors import NoRoomError, UserError

FORMAT = 1
TEMPORARY = ".kvinv-tmp"
NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)}


class DamagedError(UserError):
    """A file of the run is cut, altered, or another than its name says."""


@contextmanager
def reported(verb: str, path: Path) -> Iterator[None]:
    """Turn the system's refusal (no room, no right, no such folder) into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        todo = "make room or name another folder" if verb == "write" else "see to it and try again"
        kind = NoRoomError if error.errno in NO_ROOM else UserError
        raise kind(f"cannot {verb} {path}: {error.strerror or error}; {todo}") from error


def _write(file: Path, data: bytes) -> None:
    """Replace the file as a whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}{TEMPORARY}")
    with reported("write", file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def write_png(file: Path, picture: Image.Image) -> Path:
    """Write a picture; its path."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    _write(file, buffer.getvalue())
    return file


def write_json(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record with the format number."""
    text = json.dumps({**record, "format": FORMAT}, indent=2, ensure_ascii=False)
    _write(file, f"{text}\n".encode(errors="surrogatepass"))  # a prompt typed in no valid UTF-8 comes back


def read_json(file: Path) -> dict[str, Any]:
    """A record of this format; raises DamagedError where it is none."""
    with reported("read", file):
        data = file.read_bytes()
    try:
        record = json.loads(data)
    except ValueError as error:
        raise DamagedError(f"{file} is damaged ({error}): remove it and make it again") from error
    _check_format(file, record.pop("format", None) if isinstance(record, dict) else None)
    return record


def _check_format(file: Path, found: object) -> None:
    if str(found) != str(FORMAT):
        todo = "use the version of this program that made it, or remove it"
        raise UserError(f"{file} has format {found}, expected {FORMAT}: {todo}")


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """The blake2b of a file's header and of every tensor's name, type, shape and bytes."""
    digest = blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=32)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(file: Path, kind: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, with `kind`, `info` and a digest of everything in the header."""
    # cloned, because safetensors refuses tensors that share memory, as chunks and views do
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    header = {"format": str(FORMAT), "kind": kind, "info": json.dumps(dict(info))}
    _write(file, save(plain, header | {"digest": _digest(plain, header)}))


def read_header(file: Path, kind: str) -> tuple[dict[str, str], dict[str, Any]]:
    """A file's checked metadata, and the `info` in it; opening compares the header with the file's length."""
    if not os.path.exists(file):
        raise UserError(f"{file} is missing: run `kvinv {'invert' if kind == 'trajectory' else 'fit'}` first")
    try:
        with reported("read", file), safe_open(file, "pt") as opened:
            header: dict[str, str] = opened.metadata() or {}
        info = json.loads(header.get("info", ""))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise _damaged(file, str(error)) from error
    _check_format(file, header.get("format"))
    if header.get("kind") != kind:
        raise _damaged(file, f"it holds {header.get('kind')}, expected {kind}")
    return header, info


def read_tensors(file: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and `info` of a file of this kind; raises DamagedError where the digest does not fit."""
    header, info = read_header(file, kind)
    digest = header.pop("digest", None)
    with reported("read", file):
        data = file.read_bytes()  # not mapped: what is checked is what is used
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise _damaged(file, str(error)) from error
    if _digest(tensors, header) != digest:
        raise _damaged(file, "its digest does not fit its content")
    return tensors, info


def is_whole(file: Path, kind: str) -> bool:
    """Whether a file of this kind is there and not cut, by its header."""
    try:
        return os.path.exists(file) and bool(read_header(file, kind))
    except DamagedError:
        return False


def _damaged(file: Path, reason: str) -> DamagedError:
    return DamagedError(f"{file} is damaged ({reason}): delete it and run `kvinv fit` again")
