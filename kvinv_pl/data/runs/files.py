"""The files of a run: written atomically, checked when read, and never pickled."""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvinv_pl.data.runs.layout import Header, SerializedTensors, TensorFile, serialize
from kvinv_pl.errors import NoRoomError, UserError

FORMAT = 1
TEMPORARY = ".kvinv-tmp"
NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)}


class DamagedError(UserError):
    """A file of the run is truncated, altered, or not what its name says."""


@contextmanager
def explaining_os_errors(verb: str, path: Path) -> Iterator[None]:
    """Turn an OSError (disk full, no permission, no such folder) into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        kind = NoRoomError if error.errno in NO_ROOM else UserError
        if verb != "write":
            advice = "fix this and try again"
        else:
            advice = "make room or choose another folder" if kind is NoRoomError else "choose another folder"
        raise kind(f"cannot {verb} {path}: {error.strerror or error}; {advice}") from error


def write_atomically(file: Path, *parts: bytes | memoryview, make_folder: bool = True) -> None:
    """Replace the file by these bytes, one part after the other, atomically."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}{TEMPORARY}")
    with explaining_os_errors("write", file):
        if make_folder:
            file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as handle:
                handle.writelines(parts)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def write_png(file: Path, picture: Image.Image) -> Path:
    """Write a picture as PNG; return its path."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(file, buffer.getvalue())
    return file


def write_json(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record with the format number."""
    text = json.dumps({**record, "format": FORMAT}, indent=2, ensure_ascii=False)
    write_atomically(file, f"{text}\n".encode(errors="surrogatepass"))  # keeps a prompt of invalid UTF-8


def read_json(file: Path) -> dict[str, Any]:
    """Read a record; raises DamagedError if it is no valid JSON."""
    with explaining_os_errors("read", file):
        data = file.read_bytes()
    try:
        record = json.loads(data)
    except ValueError as error:
        raise DamagedError(f"{file} is damaged ({error}): remove it and make it again") from error
    _check_format(file, record.pop("format", None) if isinstance(record, dict) else None)
    return record


def _check_format(file: Path, version: object) -> None:
    if str(version) != str(FORMAT):
        advice = "use the version of this program that made it, or remove it"
        raise UserError(f"{file} has format {version}, expected {FORMAT}: {advice}")


Into = Callable[[Callable[[], None]], None]
"""Takes the writing of a file, to be done now or later."""


def at_once(write: Callable[[], None]) -> None:
    """Write a file now."""
    write()


def write_tensors(
    file: Path, kind: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any], into: Into = at_once
) -> None:
    """Write tensors as safetensors, with `kind`, `info` and a digest of everything in the header.

    They may be on any device, and change once this returns. Raises UserError, and writes nothing, if a number
    is not finite.
    """
    metadata = {"format": str(FORMAT), "kind": kind, "info": json.dumps(dict(info))}
    into(partial(_write, file, metadata, serialize(tensors)))


def _write(file: Path, metadata: dict[str, str], serialized: SerializedTensors) -> None:
    """The slow parts release the GIL."""
    for name, tensor in serialized.tensors():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        checked = tensor.float() if tensor.itemsize == 1 else tensor  # isfinite knows no 8-bit floats
        if not bool(checked.isfinite().all()):
            raise UserError(
                f"{metadata['kind']} was not written to {file}: {name} is not finite; use a lower learning "
                "rate or guidance scale, or precision 32-true"
            )
    header, data = Header(metadata, serialized.table), serialized.bytes()
    write_atomically(file, header.signed(header.digest(data)), data)


def read_header(file: Path, kind: str) -> tuple[dict[str, str], dict[str, Any]]:
    """A file's checked metadata, and the `info` in it; opening compares the header with the file's length."""
    if not os.path.exists(file):
        raise UserError(f"{file} is missing: run `kvinv {'invert' if kind == 'trajectory' else 'fit'}` first")
    try:
        with explaining_os_errors("read", file), safe_open(file, "pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
        info = json.loads(metadata.get("info", ""))
    except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(info, dict):
        raise _damaged(file, "its info is not a record")
    _check_format(file, metadata.get("format"))
    if metadata.get("kind") != kind:
        raise _damaged(file, f"it contains {metadata.get('kind')}, expected {kind}")
    return metadata, info


def read_tensors(file: Path, kind: str, pinned: bool = False) -> TensorFile:
    """Read a file of this kind, and check its digest; raises DamagedError if it does not match.

    `pinned` is for what goes on to a GPU of CUDA. The slow parts release the GIL.
    """
    _, info = read_header(file, kind)
    with explaining_os_errors("read", file), file.open("rb") as opened:
        # no memory map: the checked bytes are those used
        data = torch.empty(os.fstat(opened.fileno()).st_size, dtype=torch.uint8, pin_memory=pinned)
        content = memoryview(cast(Any, data.numpy()))
        opened.readinto(content)
    try:
        header = Header.of(content)
    except ValueError as error:  # it has changed since
        raise _damaged(file, str(error)) from error
    if header.digest(content[header.end :]) != header.metadata.get("digest"):
        raise _damaged(file, "its digest does not match its content")
    return TensorFile(info, data[header.end :], header.table)


def shapes_in(file: Path, kind: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, by their names, from its header alone; no digest is checked."""
    read_header(file, kind)
    with explaining_os_errors("read", file), safe_open(file, "pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def last_row(file: Path, name: str) -> Tensor:
    """The last row of one tensor of a whole file; nothing else is read, and no digest is checked."""
    with explaining_os_errors("read", file), safe_open(file, "pt") as opened:
        return opened.get_slice(name)[-1:]


def is_whole(file: Path, kind: str) -> bool:
    """Whether a file of this kind exists and is not truncated, by its header."""
    try:
        return os.path.exists(file) and bool(read_header(file, kind))
    except DamagedError:
        return False


def _damaged(file: Path, reason: str) -> DamagedError:
    return DamagedError(f"{file} is damaged ({reason}): delete it and run `kvinv fit` again")
