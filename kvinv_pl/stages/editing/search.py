"""Automatic settings: edits in several ways, of which the best by a judge is kept as chosen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.images.sheet import sheet
from kvinv_pl.data.runs.edits import CHOSEN, Edits
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.errors import UserError
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.models.vision.clip import Clip
from kvinv_pl.stages.editing.edit import edit_picture, note_existing, sheet_of
from kvinv_pl.stages.editing.judging import Candidate, Judging, front, ranked
from kvinv_pl.stages.kinds import at_least_1
from kvinv_pl.stages.progress import Watch
from kvinv_pl.stages.settings import EditSettings

Auto = Literal["auto"]
GRIDS: Mapping[str, tuple[float, ...]] = {
    "start": (0.0, 0.1, 0.2, 0.3, 0.45, 0.6),
    "guidance": (0.6, 1.0, 1.4),
    "sharpness": (1.0, 1.5, 2.0),
}
"""What is tried of a setting that is auto; of guidance, times its default."""
WITHOUT: Mapping[str, float | None] = {"start": 0.0, "guidance": None, "sharpness": 1.0}
"""What a setting that is auto is elsewhere, in tuning for one."""


@dataclass(frozen=True)
class Search:
    """Which settings of an edit are tried, and how many edits are shown; without `clip` the model judges."""

    auto: tuple[str, ...]
    candidates: int
    clip: str | None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Search:
        """From the parameters of KVInversion, by their names."""
        at_least_1("candidates", given["candidates"])
        auto = tuple(name for name in GRIDS if given[name] == "auto")
        if "sharpness" in auto and given["reading"] != "frozen":
            raise UserError(f"sharpness: expected 1 with reading {given['reading']}, got auto")
        found = cls(auto, given["candidates"], given["judge"])
        if given["judge"] is not None and not found.searches:
            raise UserError("judge: expected a search with it: give --start auto or --model.candidates N")
        return found

    @property
    def searches(self) -> bool:
        """Whether anything is tried."""
        return bool(self.auto) or self.candidates > 1

    def grid(self, settings: EditSettings) -> list[EditSettings]:
        """What is tried, with these settings for the rest; where nothing is auto, starts are."""
        names = self.auto or ("start",)
        scale = {"guidance": settings.guidance}
        tried = itertools.product(
            *([round(value * scale.get(name, 1.0), 4) for value in GRIDS[name]] for name in names)
        )
        return [replace(settings, **dict(zip(names, values, strict=True))) for values in tried]


def settled(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of KVInversion with a value in the place of every auto."""
    return {
        name: WITHOUT[name] if value == "auto" and name in GRIDS else value for name, value in given.items()
    }


def search_edits(
    denoiser: Denoiser,
    image: SourceImage,
    settings: EditSettings,
    search: Search,
    watch: Watch,
    again: bool = False,
) -> list[Path]:
    """Edit in every way of the grid, show the best, and return the chosen edit of each target.

    All edits stay in the run folder, as any others, with their figures; `candidates.png` has the best beside
    the source, and the chosen one is marked there and on the sheet.
    """
    clip = None if search.clip is None else Clip.load(search.clip, denoiser.device)
    judging, names = Judging(denoiser, image, clip), search.auto or ("start",)
    there = list[Path]()
    tried = [
        (each, edit_picture(denoiser, image, each, watch, again, there)) for each in search.grid(settings)
    ]
    note_existing(image, there, watch)
    chosen = list[Path]()
    shown: list[tuple[Image.Image, str]] = []
    marked, edits = list[int](), Edits(image.store.folder)
    for n, target in enumerate(image.targets):
        found = [judging.candidate(each, paths[n], target) for each, paths in tried]
        order = ranked(found)
        for line in _lines(image, target, found, order[0], names):
            watch.progress.note(line)
        chosen.append(order[0].file)
        edits.note_search(target, {each.file: _note(each, search, order[0]) for each in found})
        marked.append(len(shown) + 1)  # behind the source
        shown += list(_shown(image, target, order[: search.candidates], names))
    pictures, captions = zip(*shown, strict=True)
    page = sheet(pictures, captions, search.candidates + 1, marked)
    image.store.save_picture("candidates", page)
    image.store.save_picture("sheet", sheet_of(image.store))  # of each edit's making, without the choice
    if search.candidates > 1:
        watch.progress.note(f"look at {image.store.folder / 'candidates.png'}")
    return chosen


def _lines(
    image: SourceImage, target: str, found: Sequence[Candidate], best: Candidate, names: Sequence[str]
) -> Iterator[str]:
    yield (
        f"{image.name}, {target!r}: tried {len(found)} settings; of those with at least half of the best "
        "agreement the earliest start is chosen, and of several the most alike"
    )
    figures = "agreement {0.agreement:.3g}, likeness {0.likeness:.3g}"
    yield f"  chosen: {best.named(names)}, {figures.format(best)}: {best.file}"
    yield "  with no other better in both agreement and likeness:"
    for each in front(found):
        yield f"    {each.named(names)}: {figures.format(each)}"


def _shown(
    image: SourceImage, target: str, best: Sequence[Candidate], names: Sequence[str]
) -> Iterator[tuple[Image.Image, str]]:
    yield open_picture(image.store.folder / "source.png").image, f"source\nto become: {target}"
    for n, each in enumerate(best):
        figures = f"agreement {each.agreement:.3g}\nlikeness {each.likeness:.3g}"
        first = "" if n else f"{CHOSEN}\n"
        yield open_picture(each.file).image, f"{first}{each.named(names)}\n{figures}"


def _note(each: Candidate, search: Search, best: Candidate) -> dict[str, Any]:
    """What the record of an edit says of the search, among its figures."""
    return {
        "chosen": each.file == best.file,
        "agreement": each.agreement,
        "likeness": each.likeness,
        "judge": search.clip,
    }
