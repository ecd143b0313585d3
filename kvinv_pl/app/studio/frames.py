"""The predicted x_0 along the process, every few steps: of edits as they are made, of a run's tuning."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from kvinv_pl.api import KVInverter
from kvinv_pl.data.files import write_png
from kvinv_pl.data.geometry import to_image
from kvinv_pl.data.records import geometry_of
from kvinv_pl.data.run_store import RunStore

OWN = ".studio"
"""Of the folder, and of a run: what the page keeps besides."""
FRAMES = 8
"""Pictures along a process, about."""


class Frames:
    """What the latents of a run say of its picture, kept beside its edits."""

    def __init__(self, inverter: KVInverter, store: RunStore) -> None:
        """Take the model, which is loaded when the first step comes, and the run."""
        self._model, self._store = inverter.model, store
        self._before: Tensor | None = None
        self._seen: list[tuple[int, Image.Image]] = []

    def see(self, i: int, t: int, z: Tensor) -> None:
        """Note what the latents before and after a step of an edit say of the picture."""
        before = self._store.trajectory()[-1:].to(z) if i == 0 else self._before
        if before is not None and self._is_wanted(i):
            self._note(i, t, before[:1], z[:1])
        self._before = z

    @torch.no_grad()
    def read_tuning(self) -> None:
        """Note the same of the steps that a tuned run has stored, by which its reconstruction came."""
        table = self._model.denoiser.table
        for i in filter(self._is_wanted, range(len(table))):
            before = self._store.step(i - 1).z if i else self._store.trajectory()[-1]
            self._note(i, int(table.timesteps[i]), before[None], self._store.step(i).z[None])

    def save(self, edit: Path | None) -> None:
        """Write them as those of an edit, or of the tuning."""
        place = _place(self._store.folder, edit)
        shutil.rmtree(place, ignore_errors=True)
        for n, (t, picture) in enumerate(self._seen):
            write_png(place / f"{n:02d}-{t}.png", picture)
        self._seen = []

    def _is_wanted(self, i: int) -> bool:
        table = self._model.denoiser.table
        every = max(1, len(table) // FRAMES)
        return table.has_effect(i) and (i % every == 0 or i == len(table) - 1)

    def _note(self, i: int, t: int, before: Tensor, after: Tensor) -> None:
        denoiser = self._model.denoiser
        z_0 = denoiser.table.predicted_z_0(before.to(denoiser.device), after.to(denoiser.device), i)
        geometry = geometry_of(self._store.read_run()["picture"])
        self._seen.append((t, to_image(denoiser.backbone.decode(z_0)[0].cpu(), geometry)))


def frames_of(folder: Path, edit: Path | None) -> list[tuple[Path, str]]:
    """The pictures along an edit, or a tuning, with their timesteps; none if it was made elsewhere."""
    found = sorted(_place(folder, edit).glob("*.png"))
    return [(file, f"timestep {int(file.stem.partition('-')[2])}") for file in found]


def _place(folder: Path, edit: Path | None) -> Path:
    """Where those of an edit are, or of the tuning."""
    return folder / OWN / "frames" / edit.stem if edit else folder / OWN / "frames-of-tuning"
