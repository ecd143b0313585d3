"""Pictures of the user's own as the cases of a bench: a list with prompts, and masks if there are any."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kvinv_pl.bench.benchmarks.cases import SOURCE, THROUGH_VAE, Case, Cases, Metric
from kvinv_pl.data.images.masks import open_mask
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.manifest import LISTS, rows_of
from kvinv_pl.data.runs.files import explaining_os_errors
from kvinv_pl.errors import UserError


@dataclass(frozen=True)
class ImageCase:
    """One picture and one of its targets."""

    name: str
    source: str
    target: str
    file: Path
    masks: Sequence[Path] = ()
    """White where the picture may be edited, each in its part."""
    kind: str = ""

    @property
    def editable(self) -> np.ndarray | None:
        """Where any of the masks is white."""
        size, found = self.picture().size, [open_mask(mask).image for mask in self.masks]
        for file, mask in zip(self.masks, found, strict=True):
            if mask.size != size:
                got, expected = ("{}x{}".format(*each) for each in (mask.size, size))
                raise UserError(f"{file} is {got}, its picture is {expected} pixels: make both the same size")
        return np.any([np.asarray(mask.convert("L")) >= 128 for mask in found], 0) if found else None

    @property
    def fingerprint(self) -> str:
        """Of the files and the prompts."""
        found = blake2b(json.dumps([self.source, self.target, self._more]).encode(), digest_size=8)
        for file in (self.file, *self.masks):
            with explaining_os_errors("read", file):
                found.update(file.read_bytes())
        return found.hexdigest()

    @property
    def _more(self) -> Any:
        """What else a case is made of."""
        return None

    @property
    def mask(self) -> np.ndarray | None:
        """Where the picture may be edited: benchmarks have no other mask."""
        return self.editable

    def picture(self) -> Image.Image:
        """The source."""
        return open_picture(self.file).image


@contextmanager
def reading_json(file: Path, what: str) -> Iterator[Any]:
    """The content of a JSON file of a published benchmark, refused if it is not as it was published."""
    try:
        with explaining_os_errors("read", file):
            text = file.read_text(encoding="utf-8")
        yield json.loads(text)
    except UserError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not a {what}: {type(error).__name__} {error}; download it again"
        ) from error


def reference_rows() -> Mapping[str, Callable[[Case], Image.Image]]:
    """The rows of photographs that no method makes."""
    return {SOURCE: lambda case: case.picture(), f"{SOURCE} {THROUGH_VAE}": lambda case: case.picture()}


def image_list(place: Path, count: int | None, metrics: Sequence[Metric]) -> Cases:
    """The rows of a list as `kvinv run` takes it, one case for each target; the first `count`, or all.

    A folder with one list in it does as well.
    """
    file = _find_list(place)
    cases = list[ImageCase]()
    for row in rows_of(file, "", [], None):
        if missing := [path for path in (row.image, row.mask) if path is not None and not path.is_file()]:
            raise UserError(f"{file} names {missing[0]}, which is not there: correct it or take it out")
        if not row.targets:
            raise UserError(f"{file}: {row.image.name} has no target: fill the column targets")
        for target in row.targets:
            name = f"{len(cases) + 1:04d}-{row.image.stem}"
            masks = () if row.mask is None else (row.mask,)
            cases.append(ImageCase(name, row.source, target, row.image, masks))
    return Cases(f"the list {file.resolve()}", cases[:count], metrics, reference_rows())


def _find_list(place: Path) -> Path:
    lists = sorted(file for file in place.glob("*") if file.suffix.lower() in LISTS) if place.is_dir() else []
    file = lists[0] if len(lists) == 1 else place
    if file.suffix.lower() not in LISTS or file.is_dir():
        kinds = ", ".join(LISTS)
        raise UserError(
            f"data: expected world, a folder of PIE-Bench or EditBench, a list ({kinds}) or a folder with "
            f"one list in it, got {place}" + (f" with {len(lists)} lists" if lists else "")
        )
    return file
