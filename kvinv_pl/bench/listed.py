"""Pictures of the user's own as the cases of a bench: a list with prompts, and masks if there are any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from kvinv_pl.bench.cases import THROUGH_VAE, Cases, Metric
from kvinv_pl.data.manifest import LISTS, rows_of
from kvinv_pl.data.masks import open_mask
from kvinv_pl.data.pictures import open_picture
from kvinv_pl.errors import UserError


@dataclass(frozen=True)
class ListedCase:
    """One picture and one of its targets."""

    name: str
    source: str
    target: str
    file: Path
    mask: Path | None
    kind: str = ""

    @property
    def editable(self) -> np.ndarray | None:
        """The mask, white where the picture may be edited."""
        if self.mask is None:
            return None
        found = open_mask(self.mask).image
        if found.size != self.picture().size:
            raise UserError(f"{self.mask} is of another size than {self.file}: make both of one size")
        return np.asarray(found.convert("L")) >= 128

    def picture(self) -> Image.Image:
        """The source."""
        return open_picture(self.file).image


def listed(file: Path, count: int | None, metrics: Sequence[Metric]) -> Cases:
    """The rows of a list as `kvinv run` takes it, one case for each target; the first `count`, or all."""
    if file.suffix.lower() not in LISTS:
        raise UserError(
            f"data: expected world, a folder of PIE-Bench or a list ({', '.join(LISTS)}), got {file}"
        )
    cases = list[ListedCase]()
    for row in rows_of(file, "", [], None):
        if not row.targets:
            raise UserError(f"{file}: {row.image.name} has no target: fill the column targets")
        for target in row.targets:
            name = f"{len(cases) + 1:04d}-{row.image.stem}"
            cases.append(ListedCase(name, row.source, target, row.image, row.mask))
    references = {
        "source": lambda case: case.picture(),
        f"source {THROUGH_VAE}": lambda case: case.picture(),
    }
    return Cases(f"the list {file.resolve()}", cases[:count], metrics, references)
