"""Whether an edited picture shows the same animal in the target action: measured against what was drawn."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from PIL import Image

from kvinv_pl.errors import UserError
from kvinv_pl.menagerie.analysis.counting import count_marks
from kvinv_pl.menagerie.analysis.measures import (
    accent_elsewhere,
    colour_error,
    scene_error,
    second_recall_precision,
    size_and_place,
    thin_colour_error,
)
from kvinv_pl.menagerie.analysis.regions import best_shift, grown, overlap, shifted
from kvinv_pl.menagerie.analysis.truth import BACKGROUND, NEAR, REACH, SECOND, Truth, rgb_of
from kvinv_pl.menagerie.drawn.world import Animal

SCENERY = ("sun", "hill", "sky", "ground")
AT_LEAST: Mapping[str, float] = MappingProxyType(
    {"second_recall": 0.5, "second_precision": 0.5, "outline": 0.7}
)
AT_MOST: Mapping[str, float] = MappingProxyType(
    {
        "second_colour": 0.11, "accent": 0.12, "accent_elsewhere": 0.5, "body": 0.04, "marks_off": 0,
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
        bars = [("<", *item) for item in AT_LEAST.items()] + [(">", *item) for item in AT_MOST.items()]
        failed = [bar for bar in bars if not self.passes(bar[1])]
        return tuple(f"{name} {getattr(self, name):.2f} {sign} {bar}" for sign, name, bar in failed)

    def passes(self, name: str) -> bool:
        """Whether this figure is within its tolerance."""
        value = getattr(self, name)
        return not (value < AT_LEAST.get(name, -math.inf) or value > AT_MOST.get(name, math.inf))

    @property
    def same_animal(self) -> bool:
        """The verdict: every figure is within its tolerance."""
        return all(self.passes(field.name) for field in fields(self))


def identity(picture: Image.Image, animal: Animal, target: str) -> Identity:
    """Measure a picture that should show this animal in the action `target`: square, of any size."""
    if picture.width != picture.height:
        raise UserError(
            f"a picture of the menagerie is square, got {picture.width} x {picture.height} pixels"
        )
    return compare(picture, Truth(animal, target, picture.width))


def compare(picture: Image.Image, truth: Truth) -> Identity:
    """`identity` of one of several pictures of one animal, action and size, which is `truth` once for all."""
    rgb = rgb_of(picture)
    seen = (truth.labels(truth.distances(rgb, truth.scenery)) != BACKGROUND) & truth.around
    # the rest is compared with the animal laid onto its true place
    shift = best_shift(seen, truth.own_animal, round(truth.pixels(REACH)))
    aligned = shifted(rgb, *shift)
    distances = truth.distances(aligned, shifted(truth.scenery, *shift))
    now = truth.labels(distances)
    second = (now == SECOND) & grown(truth.silhouette, truth.pixels(NEAR))
    recall, precision = second_recall_precision(truth, second)
    marks, least, most = count_marks(truth, distances)
    size, place = size_and_place(truth, seen)
    return Identity(
        second_recall=recall,
        second_precision=precision,
        second_colour=thin_colour_error(truth, aligned, truth.coloured, now != BACKGROUND),
        accent=thin_colour_error(truth, aligned, truth.parts["accent"], now != BACKGROUND),
        accent_elsewhere=accent_elsewhere(truth, second),
        body=colour_error(truth, aligned, truth.body),
        marks=marks,
        marks_off=max(least - marks, marks - most, 0),
        size=size,
        place=place,
        outline=overlap(shifted(seen, *shift), truth.own_animal),
        **{part: scene_error(truth, rgb, part) for part in SCENERY},
    )
