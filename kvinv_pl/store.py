"""The run folder: run.json, the trajectory, psi_t of every phase, pictures and edits. Nothing is pickled."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from kvinv_pl.errors import UserError

FORMAT = 1
_TEMPORARY = ".kvinv-tmp"


class InUseError(UserError):
    """Another process holds the run."""


class DamagedError(UserError):
    """A file of the run is cut, altered, or another than its name says."""


@dataclass(frozen=True)
class Step:
    """One finished phase: psi_t, z-tilde after the step, and K-bar, V-bar by site path if stored."""

    psi: dict[str, Tensor]
    z: Float[Tensor, "c h w"]
    kv: dict[str, tuple[Tensor, Tensor]] | None
    info: dict[str, Any]


class RunStore:
    """One image's run folder; every write is atomic and every read is checked. Writers hold `lock()`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Name the folder; it is made when something is first written to it."""
        self.folder = Path(folder)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run against other processes, and clear what a killed one left; raises InUseError."""
        owner = self.folder / ".lock.pid"
        with _reported("write", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:  # flock, or what Windows has for it: the system frees it when its process dies
                held = FileLock(self.folder / ".lock").acquire(timeout=0)
            except Timeout:
                process = owner.read_text() if owner.exists() else "unknown"
                message = f"{self.folder} is in use by process {process}: wait for it or stop it"
                raise InUseError(message) from None
        with held:
            with _reported("write", self.folder):
                for folder in (self.folder, self.folder / "steps", self.folder / "edits"):
                    for leftover in folder.glob(f".*{_TEMPORARY}"):
                        leftover.unlink()
                owner.write_text(str(os.getpid()))
            try:
                yield
            finally:
                owner.unlink(missing_ok=True)

    def has_run(self) -> bool:
        """Whether the folder holds a run.json."""
        return os.path.isfile(self.folder / "run.json")

    def read_run(self) -> dict[str, Any]:
        """What `write_run` was given, as JSON returns it (tuples are lists)."""
        if not self.has_run():
            raise UserError(f"{self.folder} has no run.json: name the folder of a run, or make one")
        return _read_json(self.folder / "run.json")

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Write run.json, with the format number."""
        _write_json(self.folder / "run.json", run)

    def require(self, expected: Mapping[str, Any], keys: Iterable[str]) -> None:
        """Raise UserError at the first field of `keys` whose value in run.json is not the expected one."""
        run = self.read_run()
        for key in keys:
            if difference := _difference(key, run.get(key), json.loads(json.dumps(expected[key]))):
                made = "{} was made with {} = {}, not {}".format(self.folder, *difference)
                raise UserError(f"{made}: give what it was made with, or another folder")

    def has_trajectory(self) -> bool:
        """Whether a whole trajectory is there, by its header."""
        return _is_whole(self.folder / "trajectory.safetensors", "trajectory")

    def save_trajectory(self, z: Float[Tensor, "levels c h w"]) -> None:
        """Write z-hat_0 ... z-hat_T in fp32."""
        _write_tensors(self.folder / "trajectory.safetensors", "trajectory", {"z": z.float()}, {})

    def trajectory(self) -> Float[Tensor, "levels c h w"]:
        """z-hat_0 ... z-hat_T, fp32, on the CPU; raises UserError where it is missing or damaged."""
        return _read_tensors(self.folder / "trajectory.safetensors", "trajectory")[0]["z"]

    def save_step(
        self,
        i: int,
        psi: Mapping[str, Tensor],
        z: Float[Tensor, "c h w"],
        kv: Mapping[str, tuple[Tensor, Tensor]] | None,
        info: Mapping[str, Any],
    ) -> None:
        """Write phase i (from noise) as one file: psi_t by "path.name", z-tilde in fp32, and K-bar, V-bar."""
        tensors = {"z": z.float()} | {f"psi.{name}": tensor for name, tensor in psi.items()}
        for path, (k, v) in (kv or {}).items():
            tensors |= {f"kv.{path}.k": k, f"kv.{path}.v": v}
        _write_tensors(self._step(i), f"step {i}", tensors, info)

    def step(self, i: int) -> Step:
        """Phase i, on the CPU; raises UserError where it is missing or damaged."""
        tensors, info = _read_tensors(self._step(i), f"step {i}")
        psi = {name.removeprefix("psi."): t for name, t in tensors.items() if name.startswith("psi.")}
        paths = [name[len("kv.") : -len(".k")] for name in tensors if re.fullmatch(r"kv\..*\.k", name)]
        kv = {path: (tensors[f"kv.{path}.k"], tensors[f"kv.{path}.v"]) for path in paths}
        return Step(psi, tensors["z"], kv or None, info)

    def step_info(self, i: int) -> dict[str, Any]:
        """The `info` of phase i, from the file's header alone."""
        return _read_header(self._step(i), f"step {i}")[1]

    def done(self) -> set[int]:
        """Phases whose file is whole, by its header; a cut file is not done."""
        files = self.folder.glob("steps/*.safetensors")
        found = {int(file.stem) for file in files if re.fullmatch(r"0|[1-9][0-9]*", file.stem)}
        return {i for i in found if _is_whole(self._step(i), f"step {i}")}

    def drop_steps(self) -> None:
        """Remove every phase; the trajectory and the edits stay."""
        with _reported("remove", self.folder / "steps"):
            if (self.folder / "steps").exists():
                shutil.rmtree(self.folder / "steps")

    def clear(self) -> None:
        """Remove all that a run leaves, its edits too."""
        with _reported("remove", self.folder):
            for name in ("run.json", "trajectory.safetensors"):
                (self.folder / name).unlink(missing_ok=True)
            for name in ("source", "reconstruction", "sheet", "mask"):
                (self.folder / f"{name}.png").unlink(missing_ok=True)
            for name in ("steps", "edits"):
                if (self.folder / name).exists():
                    shutil.rmtree(self.folder / name)

    def edits(self) -> list[tuple[dict[str, Any], Path]]:
        """Every edit's record and picture, oldest first."""
        files = (self.folder / "edits").glob("*.json")
        records = sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name))
        return [(_read_json(file), file.with_suffix(".png")) for file in records]

    def _step(self, i: int) -> Path:
        return self.folder / "steps" / f"{i}.safetensors"

    def save_picture(self, name: str, picture: Image.Image) -> Path:
        """Write <name>.png."""
        return _write_png(self.folder / f"{name}.png", picture)

    def save_edit(self, slug: str, picture: Image.Image, record: Mapping[str, Any]) -> Path:
        """Write edits/<slug>.png and .json; the slug gets a number where an edit with other settings has it.

        Args:
            slug: the target prompt, or a name for the edit; made fit for a file name here.
            picture: the edited picture.
            record: what was asked, with which settings; its field "figures" (measured) is no setting.
        """
        words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", slug).lower())[:48].strip("-") or "edit"
        names = itertools.chain([words], (f"{words}-{n}" for n in itertools.count(2)))
        files = (self.folder / "edits" / f"{name}.json" for name in names)
        file = next(file for file in files if not file.exists() or _is_same_edit(file, record))
        _write_png(file.with_suffix(".png"), picture)
        _write_json(file, record)  # last: an edit is there when its record is
        return file.with_suffix(".png")


@contextmanager
def _reported(verb: str, path: Path) -> Iterator[None]:
    """Turn the system's refusal (no room, no right, no such folder) into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        todo = "make room or name another folder" if verb == "write" else "see to it and try again"
        raise UserError(f"cannot {verb} {path}: {error.strerror or error}; {todo}") from error


def _write(file: Path, data: bytes) -> None:
    """Replace the file as a whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}{_TEMPORARY}")
    with _reported("write", file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def _write_png(file: Path, picture: Image.Image) -> Path:
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    _write(file, buffer.getvalue())
    return file


def _write_json(file: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps({**record, "format": FORMAT}, indent=2, ensure_ascii=False)
    _write(file, f"{text}\n".encode(errors="surrogatepass"))  # a prompt typed in no valid UTF-8 comes back


def _read_json(file: Path) -> dict[str, Any]:
    with _reported("read", file):
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


def _is_same_edit(file: Path, record: Mapping[str, Any]) -> bool:
    try:
        there = _read_json(file)
    except UserError:
        return False
    asked = json.loads(json.dumps(dict(record)))
    return {**there, "figures": None} == {**asked, "figures": None}


def _difference(field: str, there: Any, asked: Any) -> tuple[str, str, str] | None:
    """The first leaf in which two JSON values differ: its field and both values, cut to a readable length."""
    if there == asked:
        return None
    if isinstance(there, list) and isinstance(asked, list) and len(there) == len(asked):
        there, asked = dict(enumerate(there)), dict(enumerate(asked))
    if isinstance(there, dict) and isinstance(asked, dict):
        missing = "nothing"
        for key in [*there, *(key for key in asked if key not in there)]:
            if found := _difference(f"{field}.{key}", there.get(key, missing), asked.get(key, missing)):
                return found
    shown = [text if len(text) <= 120 else f"{text[:117]}..." for text in map(repr, (there, asked))]
    return field, shown[0], shown[1]


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """The blake2b of a file's header and of every tensor's name, type, shape and bytes."""
    digest = blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=32)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_tensors(file: Path, kind: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    # cloned, because safetensors refuses tensors that share memory, as chunks and views do
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    header = {"format": str(FORMAT), "kind": kind, "info": json.dumps(dict(info))}
    _write(file, save(plain, header | {"digest": _digest(plain, header)}))


def _read_header(file: Path, kind: str) -> tuple[dict[str, str], dict[str, Any]]:
    """A file's checked metadata, and the `info` in it; opening compares the header with the file's length."""
    if not os.path.exists(file):
        raise UserError(f"{file} is missing: run `kvinv {'invert' if kind == 'trajectory' else 'fit'}` first")
    try:
        with _reported("read", file), safe_open(file, "pt") as opened:
            header: dict[str, str] = opened.metadata() or {}
        info = json.loads(header.get("info", ""))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise _damaged(file, str(error)) from error
    _check_format(file, header.get("format"))
    if header.get("kind") != kind:
        raise _damaged(file, f"it holds {header.get('kind')}, expected {kind}")
    return header, info


def _read_tensors(file: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    header, info = _read_header(file, kind)
    digest = header.pop("digest", None)
    with _reported("read", file):
        data = file.read_bytes()  # not mapped: what is checked is what is used
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise _damaged(file, str(error)) from error
    if _digest(tensors, header) != digest:
        raise _damaged(file, "its digest does not fit its content")
    return tensors, info


def _is_whole(file: Path, kind: str) -> bool:
    try:
        return os.path.exists(file) and bool(_read_header(file, kind))
    except DamagedError:
        return False


def _damaged(file: Path, reason: str) -> DamagedError:
    return DamagedError(f"{file} is damaged ({reason}): delete it and run `kvinv fit` again")
