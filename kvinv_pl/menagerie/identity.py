"""Whether an edited picture shows the same animal in the asked action: measured against what was drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

import numpy as np
from PIL import Image

from kvinv_pl.errors import UserError
from kvinv_pl.menagerie.counting import count_marks
from kvinv_pl.menagerie.known import NEAR, REACH, SCENERY, SECOND, Known, rgb_of
from kvinv_pl.menagerie.regions import best_shift, grown, overlap, shifted, shifts
from kvinv_pl.menagerie.world import Animal

# shares of the side
BESIDE = 1 / 64  # how far beside its true place the second colour is still at it
FEW = 4 / 64  # a square of this side has too few pixels of the second colour for recall and precision
SMALL = 3 / 64  # and one of this side too few of a part of the scene
WINDOW = 8 / 64  # over which the scene is compared

AT_LEAST: Mapping[str, float] = MappingProxyType(
    {"second_recall": 0.5, "second_precision": 0.5, "outline": 0.7}
)
AT_MOST: Mapping[str, float] = MappingProxyType(
    {
        "second_colour": 0.13, "accent": 0.15, "accent_elsewhere": 0.5, "body": 0.04, "marks_off": 0,
        "size": 0.12, "place": 0.05, "sun": 0.10, "hill": 0.10, "sky": 0.10, "ground": 0.10,
    }
)  # fmt: skip
"""What the same animal may be off by; chosen with tools/calibrate_identity.py."""


@dataclass(frozen=True)
class Identity:
    """Figures of one picture. Colour errors are of medians, the mean of the three channels, 0 to 1.

    What the true picture shows too little of to be judged is NaN, and counts for nothing in the verdict.
    """

    second_recall: float
    """Of the true second colour, how much is found: 1 all, 0 no more than by chance."""
    second_precision: float
    """Of what is seen of the second colour, how much is where it should be: 1 all, 0 as by chance."""
    second_colour: float
    """Its error."""
    accent: float
    """Error of the colour of tail tip, ears or collar."""
    accent_elsewhere: float
    """Share of the second colour in the two accents that this animal does not have; the worse of them."""
    body: float
    """Error of the body's colour."""
    marks: int
    """Stripes or spots that are seen."""
    marks_off: int
    """By how many these are too few or too many."""
    size: float
    """Error of the animal's size: of the logarithm of the square root of its area."""
    place: float
    """How far the animal is from its true place, in shares of the side."""
    outline: float
    """Intersection over union with the true outline, after a small shift."""
    sun: float
    """Error of what is seen of the sun away from source and edit, where it is worst."""
    hill: float
    """That of the hill."""
    sky: float
    """That of the sky."""
    ground: float
    """That of the ground."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not the same animal, in words; nothing where it is."""
        low = [f"{name} {getattr(self, name):.2f} < {bar}" for name, bar in AT_LEAST.items() if not self.kept(name)]
        high = [f"{name} {getattr(self, name):.2f} > {bar}" for name, bar in AT_MOST.items() if not self.kept(name)]
        return (*low, *high)

    def kept(self, name: str) -> bool:
        """Whether this figure is within its tolerance."""
        value = getattr(self, name)
        return not (value < AT_LEAST.get(name, -math.inf) or value > AT_MOST.get(name, math.inf))

    @property
    def same_animal(self) -> bool:
        """The verdict: every figure is within its tolerance."""
        return all(self.kept(field.name) for field in fields(self))


def identity(picture: Image.Image, animal: Animal, target: str) -> Identity:
    """Measure a picture that should show this animal, seen in its own action before, in the action `target`."""
    if picture.width != picture.height:
        raise UserError(f"a picture of the menagerie is square, got {picture.width} x {picture.height} pixels")
    return compare(picture, Known(animal, target, picture.width))


def compare(picture: Image.Image, known: Known) -> Identity:
    """`identity` of one of several pictures of one animal, action and size, which is `known` once for all."""
    rgb = rgb_of(picture)
    seen = (known.seen(known.distances(rgb, known.scenery)) != SCENERY) & known.around
    # the rest is compared with the animal laid onto its true place
    shift = best_shift(seen, known.own_animal, round(known.pixels(REACH)))
    aligned = shifted(rgb, *shift)
    distances = known.distances(aligned, shifted(known.scenery, *shift))
    now = known.seen(distances)
    second = (now == SECOND) & grown(known.silhouette, known.pixels(NEAR))
    recall, precision = _second(known, second)
    marks, least, most = count_marks(known, distances)
    size, place = _size_and_place(known, seen)
    near = known.pixels(NEAR)
    return Identity(
        second_recall=recall,
        second_precision=precision,
        second_colour=_colour_error(known, aligned, known.coloured, now != SCENERY, near),
        accent=_colour_error(known, aligned, known.parts["accent"], now != SCENERY, near),
        accent_elsewhere=_accent_elsewhere(known, second),
        body=_colour_error(known, aligned, known.body, now != SCENERY, 0),
        marks=marks,
        marks_off=max(least - marks, marks - most, 0),
        size=size,
        place=place,
        outline=overlap(shifted(seen, *shift), known.own_animal),
        **{part: _scene(known, rgb, part) for part in ("sun", "hill", "sky", "ground")},
    )


def _colour_error(known: Known, rgb: np.ndarray, region: np.ndarray, animal: np.ndarray, reach: float) -> float:
    """The error of the region's median colour, the least within a shift of its own that stays on the animal."""
    inner = known.inner(region)
    if not inner.any():
        return math.nan
    true = np.median(known.picture[inner], 0)
    on_animal = known.own_animal[inner].mean() / 2
    (rows, columns), last = np.nonzero(inner), known.size - 1
    errors = []
    for dx, dy in shifts(round(reach)):
        there = np.clip(rows + dy, 0, last), np.clip(columns + dx, 0, last)
        if not errors or animal[there].mean() >= on_animal:  # the first is no shift
            errors.append(float(np.abs(np.median(rgb[there], 0) - true).mean()))
    return min(errors)


def _beyond_chance(part: np.ndarray, whole: np.ndarray, near: np.ndarray) -> float:
    """How much of a part of the whole is near something: 0 where that is no more than of the whole, 1 for all."""
    hit, chance = near[part].mean(), near[whole].mean()
    return float(max((hit - chance) / max(1 - chance, 0.05), -1.0))


def _second(known: Known, second: np.ndarray) -> tuple[float, float]:
    """Recall and precision of the second colour beyond chance."""
    of_truth = known.own_seen == SECOND
    true, near = known.coloured & of_truth, known.pixels(BESIDE)
    if not known.enough(true, FEW):
        recall = math.nan
    else:
        recall = _beyond_chance(true, known.silhouette, grown(second, near))
    if not known.enough(second, FEW):
        precision = math.nan
    else:
        # edges that look like the second colour in the true picture may look so in this one
        allowed = known.coloured | (of_truth & grown(known.silhouette, known.pixels(NEAR)))
        precision = _beyond_chance(second, known.silhouette | second, grown(allowed, near))
    return recall, precision


def _accent_elsewhere(known: Known, second: np.ndarray) -> float:
    shares = [float(second[there].mean()) for there in known.other_accents if known.enough(there, NEAR)]
    return max(shares) if shares else math.nan


def _size_and_place(known: Known, seen: np.ndarray) -> tuple[float, float]:
    true = known.own_animal
    if not seen.any():
        return math.inf, math.inf
    (y, x), (true_y, true_x) = (np.argwhere(region).mean(0) for region in (seen, true))
    size = abs(math.log(seen.sum() / true.sum())) / 2
    return size, math.hypot(x - true_x, y - true_y) / known.size


def _scene(known: Known, rgb: np.ndarray, part: str) -> float:
    """The error of one part of the scene, as the mean of the window in which it is worst."""
    region = known.scene(part)
    if not known.enough(region, SMALL):
        return math.nan
    error = np.where(region, np.abs(rgb - known.scenery).mean(-1), 0)
    width = max(1, round(known.pixels(WINDOW)))
    errors, inside = (_window_sums(plane, width) for plane in (error, region.astype(float)))
    # a window that holds little of the part is no place of its own, but for a part that is small itself
    full = inside >= min(width * width / 2, inside.max())
    return float((errors[full] / inside[full]).max())


def _window_sums(plane: np.ndarray, width: int) -> np.ndarray:
    """Sums over every square window of the plane."""
    sums = np.pad(plane, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    return sums[width:, width:] - sums[:-width, width:] - sums[width:, :-width] + sums[:-width, :-width]
