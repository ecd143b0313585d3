"""Automatic settings: edits in several ways, judged without a truth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kvinv_pl.data.images.geometry import Geometry, shared_colours, to_pixels
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.images.sheet import sheet
from kvinv_pl.data.runs.edits import CHOSEN, Edits
from kvinv_pl.data.runs.records import geometry_of
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.errors import UserError
from kvinv_pl.models.denoiser import Denoiser, generator
from kvinv_pl.models.vision.clip import Clip
from kvinv_pl.stages.editing.edit import edit_picture, sheet_of
from kvinv_pl.stages.progress import Watch
from kvinv_pl.stages.settings import EditSettings, at_least_1

Auto = Literal["auto"]
GRIDS: Mapping[str, tuple[float, ...]] = {
    "start": (0.0, 0.1, 0.2, 0.3, 0.45, 0.6),
    "guidance": (0.6, 1.0, 1.4),
    "sharpness": (1.0, 1.5, 2.0),
}
"""What is tried of a setting that is auto; of guidance, times its default."""
WITHOUT: Mapping[str, float | None] = {"start": 0.0, "guidance": None, "sharpness": 1.0}
"""What a setting that is auto is elsewhere, in tuning for one."""
ENOUGH = 0.5  # of the best edit's agreement: an edit that has as much has done what the target says
LEVELS, NOISES = (0.35, 0.5, 0.65, 0.8), 2  # shares of the noise schedule, and how often each is drawn


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


@dataclass(frozen=True)
class Candidate:
    """One edit and what is thought of it."""

    settings: EditSettings
    file: Path
    agreement: float
    """With the target rather than with the source prompt; above 0 where the target fits better."""
    likeness: float
    """To the source picture, wherever its subject has moved."""

    def named(self, names: Sequence[str]) -> str:
        """Its settings in words."""
        return ", ".join(f"{name} {getattr(self.settings, name):g}" for name in names)


def ranked(found: Sequence[Candidate]) -> list[Candidate]:
    """The best first: of those that do what the target says, the earliest and then the most like the source.

    An early start keeps more of the subject, and costs at most the action (the paper's Fig. 6), which is seen
    to before.
    """
    bar = max(0.0, ENOUGH * max(each.agreement for each in found))
    done = [each for each in found if each.agreement > 0 and each.agreement >= bar]
    others = [each for each in found if each not in done]
    return [
        *sorted(done, key=lambda each: (each.settings.start, -each.likeness)),
        *sorted(others, key=lambda each: -each.agreement),
    ]


def front(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both, from the most like the source on."""
    return [found[n] for n in unbeaten([(each.agreement, each.likeness) for each in found])]


def unbeaten(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other is better than in one and as good in the other, by their first figure.

    Those with NaN are none.
    """

    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in points)

    known = [n for n, point in enumerate(points) if not any(map(math.isnan, point))]
    return sorted((n for n in known if not beaten(points[n])), key=lambda n: points[n][0])


@torch.no_grad()
def own_agreement(denoiser: Denoiser, z_0: Float[Tensor, "1 c h w"], source: str, target: str) -> float:
    """Which prompt predicts the noise in a picture better (Li et al., 2023), by the model itself.

    That is (error under the source - error under the target) / error under the source, squared errors.
    """
    backbone, errors = denoiser.backbone, torch.zeros(2)
    contexts = backbone.embed([source, target])[:, None].expand(-1, NOISES, -1, -1)
    for level in LEVELS:
        t = int(level * (len(backbone.alphas_cumprod) - 1))
        noise = torch.randn((NOISES, *z_0.shape[1:]), generator=generator(0, "agreement", t)).to(z_0)
        z, true = backbone.noised(z_0, noise, t), backbone.true_output(z_0, noise, t)
        out = denoiser.branches(z, torch.full((NOISES,), t, device=z.device), contexts)
        errors += (out - true).square().flatten(1).mean(1).cpu()
    return float((errors[0] - errors[1]) / errors[0])


@dataclass(frozen=True)
class Judging:
    """One picture's edits under a judge."""

    denoiser: Denoiser
    image: SourceImage
    clip: Clip | None

    @cached_property
    def _source(self) -> Image.Image:
        return open_picture(self.image.store.folder / "source.png").image

    def candidate(self, settings: EditSettings, file: Path, target: str) -> Candidate:
        """An edit with its two figures: by CLIP's directions, or by the model's errors and by colours."""
        edited, source = open_picture(file).image, self.image.source
        if self.clip is not None:
            seen = self.clip.of_picture(edited)
            towards = self.clip.of_text(target) - self.clip.of_text(source)
            likeness = 100 * float(seen @ self.clip.of_picture(self._source))
            return Candidate(settings, file, 100 * float(seen @ towards), likeness)
        geometry = Geometry(edited.size, geometry_of(self.image.store.read_run()["picture"]).resized)
        z_0 = self.denoiser.backbone.encode(to_pixels(edited, geometry)[None].to(self.denoiser.device))
        agreement = own_agreement(self.denoiser, z_0, source, target)
        return Candidate(settings, file, agreement, shared_colours(self._source, edited))


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
    tried = [(each, edit_picture(denoiser, image, each, watch, again)) for each in search.grid(settings)]
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
