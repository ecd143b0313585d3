"""The pictures along an edit or a tuning, as files that the page keeps beside a run."""

import shutil
from pathlib import Path

from kvinv_pl.data.runs.files import write_png
from kvinv_pl.stages.editing.predicted_x0 import Strip

STUDIO_DIR = ".studio"
"""Of the folder, and of a run: what the page keeps besides."""
FRAMES = 8
"""Pictures along a process."""


def save_frames(strip: Strip, folder: Path, edit: Path | None) -> None:
    """Write them as those of an edit, or of the tuning, and begin anew."""
    place = _place(folder, edit)
    shutil.rmtree(place, ignore_errors=True)
    for n, (t, picture) in enumerate(strip.pictures):
        write_png(place / f"{n:02d}-{t}.png", picture)
    strip.pictures = []


def frames_of(folder: Path, edit: Path | None) -> list[tuple[Path, str]]:
    """The pictures along an edit, or a tuning, with their timesteps; none if it was made elsewhere."""
    found = sorted(_place(folder, edit).glob("*.png"))
    return [(file, f"timestep {int(file.stem.partition('-')[2])}") for file in found]


def _place(folder: Path, edit: Path | None) -> Path:
    return folder / STUDIO_DIR / "frames" / edit.stem if edit else folder / STUDIO_DIR / "frames-of-tuning"
