"""What is known of the picture in which an animal does something, and what another picture shows of it."""

from dataclasses import replace
from functools import cached_property

import numpy as np
from PIL import Image

from kvinv_pl.menagerie.analysis.regions import core, grown
from kvinv_pl.menagerie.drawn.drawing import ANIMAL
from kvinv_pl.menagerie.drawn.world import ACCENTS, Animal

BACKGROUND, BODY, SECOND, INK = range(4)  # what a pixel may be of
SHADES = (0.66, 1.16)  # of the body's colour: the far ear and the top of the trunk
NIGHT, DEEPEST = np.array([0.12, 0.14, 0.2], np.float32), 0.35  # of a shadow: its colour, and how much of it
FACE = np.array([0.06, 0.05, 0.08], np.float32)
FAINT = 0.08  # a pixel nearer to the scenery than this is the scenery
# shares of the side
REACH = 3 / 64  # how far a picture may be shifted, and how far from the animals the scene is away from them
NEAR = 2 / 64  # how far from its true place a part of the animal is looked for
EDGE = 0.75 / 64  # what anti-aliasing and a decoder blur


def rgb_of(picture: Image.Image) -> np.ndarray:
    """Float32 (h, w, 3) in 0..1."""
    return np.asarray(picture.convert("RGB"), np.float32) / 255


def _to_segment(colour: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far colours (h, w, 3) are from the mixtures of a and b."""
    ab = b - a
    share = ((colour - a) * ab).sum(-1) / np.maximum((ab * ab).sum(-1), 1e-9)
    return np.linalg.norm(colour - a - np.clip(share, 0, 1)[..., None] * ab, axis=-1)


class Truth:
    """The true picture of an animal in an action, its parts, and the scene that it shares with the source."""

    def __init__(self, animal: Animal, target: str, size: int) -> None:
        self.animal, self.target, self.size = animal, target, size
        self.picture = rgb_of(animal.render(target, size))
        self.scenery = animal.scenery(size)
        self.parts, self._source = animal.parts(target, size), animal.parts(None, size)
        self.silhouette = self._silhouette(self.parts)
        self.coloured = self.parts["marks"] | self.parts["accent"]  # with the second colour

    @staticmethod
    def _silhouette(parts: dict[str, np.ndarray]) -> np.ndarray:
        return np.any([parts[part] for part in ANIMAL], axis=0)

    def pixels(self, share: float) -> float:
        """From a share of the side to pixels."""
        return share * self.size

    def enough(self, region: np.ndarray, share: float) -> bool:
        """Whether the region is at least as large as a square whose side is this share of the picture's."""
        return bool(region.sum() >= max(1.0, self.pixels(share) ** 2))

    def inner(self, region: np.ndarray) -> np.ndarray:
        """What is left of a region without its blurred edge, or all of it where that is next to nothing."""
        return core(region, self.pixels(EDGE), int(self.pixels(2 / 64) ** 2))

    @cached_property
    def body(self) -> np.ndarray:
        """Pixels of the body's own colour, away from every other."""
        other = self.coloured | self.parts["face"] | ~self.silhouette
        return self.inner(self.parts["body"] & ~grown(other, self.pixels(EDGE)))

    @cached_property
    def along_trunk(self) -> np.ndarray:
        """`Animal.along_trunk` of the true picture."""
        return self.animal.along_trunk(self.target, self.size)

    @cached_property
    def other_accents(self) -> list[np.ndarray]:
        """Where the accents would be that this animal does not have, away from its second colour."""
        others = [replace(self.animal, accent=accent) for accent in ACCENTS if accent != self.animal.accent]
        free = ~grown(self.coloured, self.pixels(NEAR))
        return [other.parts(self.target, self.size)["accent"] & free for other in others]

    @cached_property
    def around(self) -> np.ndarray:
        """Where the animal may be seen: around its silhouettes in the source and in the true picture."""
        return grown(self.silhouette | self._silhouette(self._source), self.pixels(2 * REACH))

    @cached_property
    def away(self) -> np.ndarray:
        """Where neither animal is, nor a shadow."""
        shaded = self.parts["shadow"] | self._source["shadow"]
        animals = self.silhouette | self._silhouette(self._source)
        return ~(grown(animals, self.pixels(REACH)) | shaded)

    def scene(self, part: str) -> np.ndarray:
        """Where this part of the scene is seen in source and true picture, away from both animals."""
        return core(self.parts[part] & self._source[part] & self.away, self.pixels(EDGE), 0)

    def distances(self, picture: np.ndarray, scenery: np.ndarray) -> np.ndarray:
        """How far pixels (h, w, 3) are from scenery, body, second colour and ink: (4, h, w)."""
        shaded = scenery * (1 - DEEPEST) + NIGHT * DEEPEST
        dark, light = (np.clip(self.animal.body * shade, 0, 1) for shade in SHADES)
        return np.stack(
            [
                _to_segment(picture, scenery, shaded),
                _to_segment(picture, dark, light),
                np.linalg.norm(picture - self.animal.second, axis=-1),
                np.linalg.norm(picture - FACE, axis=-1),
            ]
        )

    def labels(self, distances: np.ndarray) -> np.ndarray:
        """Which of the four each pixel is of."""
        return np.where(distances[BACKGROUND] < FAINT, BACKGROUND, distances.argmin(0))

    @cached_property
    def own_labels(self) -> np.ndarray:
        """`labels` of the true picture: its edges may look like something else."""
        return self.labels(self.distances(self.picture, self.scenery))

    @cached_property
    def own_animal(self) -> np.ndarray:
        """Where the true picture is seen to differ from the scenery."""
        return self.own_labels != BACKGROUND
