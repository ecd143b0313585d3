"""The run folder: run.json, the trajectory, psi_t of every phase, pictures and edits. Nothing is pickled."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kvinv_pl.data.images.geometry import Geometry
from kvinv_pl.data.runs.edits import Edits
from kvinv_pl.data.runs.files import (
    TEMPORARY,
    Into,
    at_once,
    explaining_os_errors,
    is_whole,
    last_row,
    read_header,
    read_json,
    read_tensors,
    shapes_in,
    write_json,
    write_png,
    write_tensors,
)
from kvinv_pl.data.runs.lock import locked
from kvinv_pl.data.runs.records import first_difference, geometry_of
from kvinv_pl.data.runs.tensors import Bars, Step, pack, step_tensors, unpack
from kvinv_pl.errors import UserError


@dataclass
class _Memory:
    """Cache of what was read of a run folder while it is locked."""

    run: dict[str, Any] | None = None
    trajectory: Tensor | None = None
    users: int = 0
    """How many contexts use the cache; with none, nothing is kept."""


class RunStore:
    """One image's run folder; every write is atomic and every read is checked. Writers hold `lock()`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Name the folder; it is created by the first write."""
        self.folder = self._attempt_folder = Path(folder)
        self._memory = _Memory()

    def _step(self, i: int) -> Path:
        return self._attempt_folder / "steps" / f"{i}.safetensors"

    def _pivot(self, i: int) -> Path:
        return self._attempt_folder / "pivot" / f"{i}.safetensors"

    def at_attempt(self, number: int) -> RunStore:
        """The same run with the phases of a later attempt at tuning, in its own folder; 0: the first."""
        other = RunStore(self.folder)
        other._memory = self._memory
        other._attempt_folder = self.folder / "attempts" / str(number) if number else self.folder
        return other

    def settle(self) -> None:
        """Move the attempt that run.json keeps into the run's place, and drop the others.

        Psi tuned at the pivots is dropped, too. After a crash on the way, the next call finishes it.
        """
        reconstruction = self.read_run().get("reconstruction")
        if reconstruction is None:
            return
        self._remove("pivot")
        kept = self.folder / "attempts" / str(reconstruction["kept"]) / "steps"
        if reconstruction["kept"] and kept.exists():
            with explaining_os_errors("write", self.folder):
                shutil.rmtree(self.folder / "steps", ignore_errors=True)
                os.replace(kept, self.folder / "steps")
            self.drop_attempts()
        for number in range(1, len(reconstruction["attempts"])):  # left by a crash
            self._remove(f"attempts/{number}")

    def drop_attempts(self) -> None:
        """Remove the files of later attempts at tuning."""
        self._remove("attempts")

    def _remove(self, name: str) -> None:
        with explaining_os_errors("remove", self.folder / name):
            if (self.folder / name).exists():
                shutil.rmtree(self.folder / name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run, and remove the temporary files of a killed process; raises InUseError."""
        with locked(self.folder), self.read_once():
            with explaining_os_errors("write", self.folder):
                tuned = ("steps/", "pivot/", "attempts/*/steps/", "attempts/*/pivot/")
                for place in ("", "edits/", *tuned):
                    for leftover in self.folder.glob(f"{place}.*{TEMPORARY}"):
                        leftover.unlink()
            yield

    @contextmanager
    def read_once(self) -> Iterator[None]:
        """Cache run.json and the trajectory in this context, where no other process writes them."""
        memory = self._memory
        memory.users += 1
        try:
            yield
        finally:
            memory.users -= 1
            if not memory.users:
                memory.run = memory.trajectory = None

    def has_run(self) -> bool:
        """Whether the folder contains a run.json."""
        return os.path.isfile(self.folder / "run.json")

    def read_run(self) -> dict[str, Any]:
        """The content of run.json (tuples are lists)."""
        if not self.has_run():
            raise UserError(f"{self.folder} has no run.json: name the folder of a run, or make one")
        run = self._memory.run or read_json(self.folder / "run.json")
        if self._memory.users:
            self._memory.run = run
        return deepcopy(run)

    def geometry(self) -> Geometry:
        """How the picture reaches the model's pixels, from run.json."""
        return geometry_of(self.read_run()["picture"])

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Write run.json, with the format number."""
        self._memory.run = None
        write_json(self.folder / "run.json", run)
        if self._memory.users:
            self._memory.run = json.loads(json.dumps(run))

    def require(self, expected: Mapping[str, Any], keys: Iterable[str]) -> None:
        """Raise UserError at the first field of `keys` whose value in run.json is not the expected one."""
        run = self.read_run()
        for key in keys:
            if difference := first_difference(key, run.get(key), json.loads(json.dumps(expected[key]))):
                raise UserError(
                    f"{self.folder} was made with {difference}: use the same settings or another folder, "
                    "or start again with `kvinv run` or `kvinv fit` and --overwrite"
                )

    def has_trajectory(self) -> bool:
        """Whether a complete and finite trajectory exists, by its header and its noisiest level.

        What is not finite stays so at every later level.
        """
        file = self.folder / "trajectory.safetensors"
        return is_whole(file, "trajectory") and bool(last_row(file, "z").isfinite().all())

    def save_trajectory(self, z: Float[Tensor, "levels c h w"]) -> None:
        """Write z-hat_0 ... z-hat_T in fp32."""
        self._memory.trajectory = None  # it is read back, and so checked, before it is used
        write_tensors(self.folder / "trajectory.safetensors", "trajectory", {"z": z.float()}, {})

    def latent_grid(self) -> tuple[int, int]:
        """Height and width of the latents, from the trajectory's header alone."""
        _, _, height, width = shapes_in(self.folder / "trajectory.safetensors", "trajectory")["z"]
        return height, width

    def trajectory(self) -> Float[Tensor, "levels c h w"]:
        """z-hat_0 ... z-hat_T, fp32, on the CPU; raises UserError where it is missing or damaged."""
        z = self._memory.trajectory
        if z is None:
            z = read_tensors(self.folder / "trajectory.safetensors", "trajectory").tensors()["z"]
        if self._memory.users:
            self._memory.trajectory = z
        return z

    def save_step(
        self,
        i: int,
        psi: Mapping[str, Tensor],
        z: Float[Tensor, "c h w"],
        kv: Mapping[str, Bars] | None,
        info: Mapping[str, Any],
        dtype: str | None = None,
        into: Into = at_once,
    ) -> None:
        """Write phase i (from noise) as one file: psi_t by "path.name", z-tilde, and K-bar, V-bar.

        Psi, K-bar and V-bar are rounded to `dtype`, if one is given; z-tilde is always fp32. The tensors may
        be on any device, and change afterwards; `into` takes the writing, to be done now or later.
        """
        write_tensors(self._step(i), f"step {i}", step_tensors(psi, z, kv, dtype), info, into)

    def step(self, i: int, pinned: bool = False) -> Step:
        """Phase i, on the CPU, pinned for a GPU or not; raises UserError where it is missing or damaged."""
        return Step(read_tensors(self._step(i), f"step {i}", pinned))

    def save_pivot(
        self,
        i: int,
        psi: Mapping[str, Tensor],
        info: Mapping[str, Any],
        dtype: str | None = None,
        into: Into = at_once,
    ) -> None:
        """Write psi_t of step i (from noise) as tuned at its pivot, rounded to `dtype` if one is given."""
        write_tensors(self._pivot(i), f"pivot {i}", pack(psi, dtype), info, into)

    def pivot(self, i: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Psi_t and the `info` of step i as tuned at its pivot; raises UserError if missing or damaged."""
        file = read_tensors(self._pivot(i), f"pivot {i}")
        return unpack(file.tensors()), file.info

    def step_info(self, i: int) -> dict[str, Any]:
        """The `info` of phase i, from the file's header alone."""
        return read_header(self._step(i), f"step {i}")[1]

    def done(self) -> set[int]:
        """Phases with a complete file, by its header; a truncated file is not done."""
        return _whole(self._attempt_folder / "steps", "step")

    def done_at_pivots(self) -> set[int]:
        """Steps whose psi_t is tuned at the pivot, and not yet dropped."""
        return _whole(self._attempt_folder / "pivot", "pivot")

    def has_begun(self) -> bool:
        """Whether any psi_t is stored."""
        return bool(self.done() or self.done_at_pivots())

    def clear(self) -> None:
        """Remove all files of the run, its edits too."""
        self._memory.run = self._memory.trajectory = None
        with explaining_os_errors("remove", self.folder):
            for name in ("run.json", "trajectory.safetensors"):
                (self.folder / name).unlink(missing_ok=True)
            for name in ("source", "reconstruction", "sheet", "candidates", "mask"):
                (self.folder / f"{name}.png").unlink(missing_ok=True)
            for name in ("steps", "pivot", "attempts", "edits"):
                self._remove(name)

    def edits(self) -> list[tuple[dict[str, Any], Path]]:
        """Every edit's record and picture, oldest first."""
        return Edits(self.folder).all()

    def save_picture(self, name: str, picture: Image.Image) -> Path:
        """Write <name>.png."""
        return write_png(self.folder / f"{name}.png", picture)


def _whole(folder: Path, kind: str) -> set[int]:
    """The numbers of the complete files of this kind."""
    numbered = (file for file in folder.glob("*.safetensors") if re.fullmatch(r"0|[1-9][0-9]*", file.stem))
    return {int(file.stem) for file in numbered if is_whole(file, f"{kind} {file.stem}")}
