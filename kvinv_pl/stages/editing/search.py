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
from kvinv_pl.stages.editing.edit import edit_picture, note_existing, run_sheet
from kvinv_pl.stages.editing.judge import Candidate, EditJudge, pareto_front, ranked
from kvinv_pl.stages.progress import Observers
from kvinv_pl.stages.settings import EditSettings
from kvinv_pl.stages.validation import at_least_1

Auto = Literal["auto"]
GRIDS: Mapping[str, tuple[float, ...]] = {
    "start": (0.0, 0.1, 0.2, 0.3, 0.45, 0.6),
    "guidance": (0.6, 1.0, 1.4),
    "sharpness": (1.0, 1.5, 2.0),
}
"""What is tried of a setting that is auto; of guidance, times its default."""
VALUE_OF_AUTO: Mapping[str, float | None] = {"start": 0.0, "guidance": None, "sharpness": 1.0}
"""What a setting that is auto is outside of a search, in tuning for one."""


@dataclass(frozen=True)
class Search:
    """Which settings of an edit are tried, and how many edits are shown; without `clip` the model judges."""

    auto: tuple[str, ...]
    candidates: int
    clip: str | None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Search:
        """From the parameters of KVInversion, by their names."""
        at_least_1("candidates", options["candidates"])
        auto = tuple(name for name in GRIDS if options[name] == "auto")
        if "sharpness" in auto and options["reading"] != "frozen":
            raise UserError(f"sharpness: expected 1 with reading {options['reading']}, got auto")
        search = cls(auto, options["candidates"], options["judge"])
        if options["judge"] is not None and not search.is_active:
            raise UserError("judge: expected a search with it: give --start auto or --model.candidates N")
        return search

    @property
    def is_active(self) -> bool:
        """Whether edits are tried in more than one way."""
        return bool(self.auto) or self.candidates > 1

    def grid(self, settings: EditSettings) -> list[EditSettings]:
        """What is tried, with these settings for the rest; where nothing is auto, starts are."""
        names = self.auto or ("start",)
        scale = {"guidance": settings.guidance}
        tried = itertools.product(
            *([round(value * scale.get(name, 1.0), 4) for value in GRIDS[name]] for name in names)
        )
        return [replace(settings, **dict(zip(names, values, strict=True))) for values in tried]


def without_auto(options: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of KVInversion with a value in the place of every auto."""
    auto = [name for name in GRIDS if options[name] == "auto"]
    return {**options, **{name: VALUE_OF_AUTO[name] for name in auto}}


def search_edits(
    denoiser: Denoiser,
    image: SourceImage,
    settings: EditSettings,
    search: Search,
    observers: Observers,
    overwrite: bool = False,
) -> list[Path]:
    """Edit in every way of the grid, show the best, and return the chosen edit of each target.

    All edits stay in the run folder, as any others, with their figures; `candidates.png` has the best beside
    the source, if several are asked for, and the chosen one is marked there and on the sheet.
    """
    clip = None if search.clip is None else Clip.load(search.clip, denoiser.device)
    judge, names = EditJudge(denoiser, image, clip), search.auto or ("start",)
    grid = search.grid(settings)
    observers.progress.note(
        f"{image.name}: {len(grid)} edits of each target, in different settings of {' and '.join(names)}, to "
        "choose from"
    )
    tried = [(each, edit_picture(denoiser, image, each, observers, overwrite, quiet=True)) for each in grid]
    note_existing(image, [path for _, edited in tried for path in edited.existing], observers)
    chosen = list[Path]()
    tiles: list[tuple[Image.Image, str]] = []
    marked, edits = list[int](), Edits(image.store.folder)
    for n, target in enumerate(image.targets):
        candidates = [judge.candidate(each, edited.paths[n], target) for each, edited in tried]
        order = ranked(candidates)
        for line in _summary(image, target, candidates, order[0], names):
            observers.progress.note(line)
        chosen.append(order[0].file)
        edits.note_search(target, {each.file: _search_record(each, search, order[0]) for each in candidates})
        marked.append(len(tiles) + 1)  # behind the source
        tiles += list(_tiles(image, target, order[: search.candidates], names))
    image.store.save_picture("sheet", run_sheet(image.store))  # of each edit's making, without the choice
    if search.candidates > 1:
        pictures, captions = zip(*tiles, strict=True)
        page = sheet(pictures, captions, search.candidates + 1, marked)
        image.store.save_picture("candidates", page)
        observers.progress.note(f"look at {image.store.folder / 'candidates.png'}")
    return chosen


def _summary(
    image: SourceImage, target: str, candidates: Sequence[Candidate], best: Candidate, names: Sequence[str]
) -> Iterator[str]:
    yield (
        f"{image.name}, {target!r}: {len(candidates)} edits, judged by their agreement with the target and "
        "their likeness to the source, of which more is better"
    )
    figures = "agreement {0.agreement:.3g}, likeness {0.likeness:.3g}"
    yield f"  chosen: {best.describe(names)}, {figures.format(best)}: {best.file}"
    yield "    (the earliest start with at least half of the best agreement, and of several the most alike)"
    yield "  those that no other beats in both:"
    for each in pareto_front(candidates):
        yield f"    {each.describe(names)}: {figures.format(each)}"


def _tiles(
    image: SourceImage, target: str, best: Sequence[Candidate], names: Sequence[str]
) -> Iterator[tuple[Image.Image, str]]:
    yield open_picture(image.store.folder / "source.png").image, f"source\nto become: {target}"
    for n, each in enumerate(best):
        figures = f"agreement {each.agreement:.3g}\nlikeness {each.likeness:.3g}"
        first = "" if n else f"{CHOSEN}\n"
        yield open_picture(each.file).image, f"{first}{each.describe(names)}\n{figures}"


def _search_record(each: Candidate, search: Search, best: Candidate) -> dict[str, Any]:
    """What the record of an edit says of the search, among its figures."""
    return {
        "chosen": each.file == best.file,
        "agreement": each.agreement,
        "likeness": each.likeness,
        "judge": search.clip,
    }
