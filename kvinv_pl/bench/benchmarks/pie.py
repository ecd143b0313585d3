"""PIE-Bench (Ju et al., 2024) and PIE-Bench++ from a folder in the published layout."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kvinv_pl.bench.benchmarks.cases import Cases, Metric
from kvinv_pl.bench.benchmarks.image_list import ImageCase, reading_json, reference_rows
from kvinv_pl.errors import UserError

FILE, PICTURES = "mapping_file.json", "annotation_images"
SIDE = 512  # pixels of every picture, and of the masks
POSE = "5 pose"
KINDS = (
    *("0 random", "1 change object", "2 add object", "3 delete object", "4 content", POSE),
    *("6 colour", "7 material", "8 background", "9 style"),
)
"""By their number in the benchmark."""


@dataclass(frozen=True)
class PieCase(ImageCase):
    """One picture of PIE-Bench."""

    runs: tuple[int, ...] = ()
    """Of the mask, as published."""

    @property
    def editable(self) -> np.ndarray | None:
        """The mask, in the picture's size."""
        return self._resized(mask_of(self.runs))

    @property
    def _more(self) -> Any:
        return self.runs

    @property
    def mask(self) -> np.ndarray:
        """The same without the picture's edges, which are in every mask."""
        return self._resized(runs_of(self.runs))

    def _resized(self, mask: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(mask).resize(self.picture().size, Image.Resampling.NEAREST), bool)


def is_pie_bench(folder: Path) -> bool:
    """Whether there is a mapping file in the folder, or in its folder data."""
    return _mapping(folder).is_file()


def _mapping(folder: Path) -> Path:
    return next((file for file in (folder / FILE, folder / "data" / FILE) if file.is_file()), folder / FILE)


def pie_bench(folder: Path, count: int | None, metrics: Sequence[Metric]) -> Cases:
    """The cases of a folder, those of pose first; the first `count` of them, or all."""
    file = _mapping(folder)
    with reading_json(file, "mapping file of PIE-Bench") as mapping:
        cases = [_case(file, name, entry) for name, entry in mapping.items()]
    cases.sort(key=lambda case: (case.kind != POSE, case.kind))
    if count is not None:
        cases = cases[:count]
    if missing := next((case for case in cases if not case.file.is_file()), None):
        raise UserError(
            f"{file} names {missing.file}, which is not there: expected {PICTURES} beside it: unpack it there"
        )
    return Cases(f"PIE-Bench in {folder.resolve()}", cases, metrics, reference_rows())


def _case(file: Path, name: str, entry: Mapping[str, Any]) -> PieCase:
    """An entry of the mapping file; PIE-Bench++ names prompts otherwise, and has the type in the path."""
    source, target = (  # the edited words stand in brackets
        re.sub(r"[\[\]]", "", entry[first] if first in entry else entry[second])
        for first, second in (("original_prompt", "source_prompt"), ("editing_prompt", "target_prompt"))
    )
    path = str(entry["image_path"])
    number = entry.get("editing_type_id", path.partition("_")[0])
    if str(number) not in map(str, range(len(KINDS))):
        raise UserError(
            f"{file}: {name} is of the type {number!r}, expected 0 to {len(KINDS) - 1}: download it again"
        )
    mask = entry["mask"]
    runs = tuple(int(n) for n in (mask.split() if isinstance(mask, str) else mask))
    picture = file.parent / PICTURES / path
    return PieCase(str(name), source, target, picture, kind=KINDS[int(number)], runs=runs)


def mask_of(runs: Sequence[int]) -> np.ndarray:
    """The mask of start and length, start and length, ... over the rows of 512 x 512; True: may be edited.

    A run ends with the picture at the latest. The outermost rows and columns are always in it.
    """
    mask = runs_of(runs)
    mask[[0, -1]] = True
    mask[:, [0, -1]] = True
    return mask


def runs_of(runs: Sequence[int]) -> np.ndarray:
    """The same without those rows and columns."""
    flat = np.zeros(SIDE * SIDE, bool)
    for start, length in zip(runs[::2], runs[1::2], strict=False):
        flat[start : start + length] = True
    return flat.reshape(SIDE, SIDE)
