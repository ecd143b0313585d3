"""Anti-aliased drawing by signed distances: one primitive, the tapered capsule, at any picture size."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

Point = tuple[float, float]
Colour = np.ndarray  # (3,), 0..1

SCENE = ("sky", "sun", "hill", "ground", "shadow")
ANIMAL = ("body", "marks", "accent", "face")  # face: the eye and the nose
PARTS = SCENE + ANIMAL


@dataclass(frozen=True)
class Capsule:
    """The points nearer to the segment a-b than a radius that goes from `ra` at a to `rb` at b.

    `bend` lifts the middle of the segment by that much to its left, as a spine arches.
    """

    a: Point
    b: Point
    ra: float
    rb: float
    bend: float = 0.0

    @property
    def _axis(self) -> tuple[float, float, float]:
        dx, dy = self.b[0] - self.a[0], self.b[1] - self.a[1]
        if dx == dy == 0.0:  # a disc: any direction serves
            dx = 1e-4
        return dx, dy, float(np.hypot(dx, dy))

    def along_across(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates that move with the capsule: 0 at a to 1 at b along it, the signed offset across."""
        dx, dy, length = self._axis
        px, py = x - self.a[0], y - self.a[1]
        u = (px * dx + py * dy) / length**2
        v = (py * dx - px * dy) / length
        if self.bend:
            inside = np.clip(u, 0.0, 1.0)
            v = v - 4.0 * self.bend * inside * (1.0 - inside)
        return u, v

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Signed distance to the outline, negative inside; exact for straight capsules of one radius."""
        length = self._axis[2]
        u, v = self.along_across(x, y)
        t = np.clip(u, 0.0, 1.0)
        return np.hypot((u - t) * length, v) - (self.ra + (self.rb - self.ra) * t)


class Canvas:
    """A square picture in which x runs right and y runs up, in units of which the side is `side` long."""

    def __init__(self, size: int, left: float, bottom: float, side: float) -> None:
        """A black canvas of `size` pixels a side whose lower left corner is at (left, bottom)."""
        self.size = size
        self.set_view(left, bottom, side)
        self.rgb = np.zeros((size, size, 3), np.float32)
        self.covered = np.zeros((size, size), np.float32)
        self.part = np.zeros((size, size), np.uint8)  # what is seen, a number of PARTS

    def set_view(self, left: float, bottom: float, side: float) -> None:
        """Set the coordinates: the lower left corner at (left, bottom), the side `side` long."""
        centres = (np.arange(self.size, dtype=np.float32) + 0.5) / self.size
        self.x = (left + side * centres)[None, :].astype(np.float32)
        self.y = (bottom + side * (1.0 - centres))[:, None].astype(np.float32)
        self.pixel = side / self.size

    def coverage(self, distance: np.ndarray) -> np.ndarray:
        """How much of each pixel lies inside, 0..1."""
        return np.clip(0.5 - distance / self.pixel, 0.0, 1.0)

    def paint(self, alpha: np.ndarray, colour: np.ndarray, part: str) -> None:
        """Put `colour` (3,) or (h, w, 3) where alpha is 1; parts of the animal make the mask."""
        a = alpha[..., None]
        self.rgb = self.rgb * (1.0 - a) + colour * a
        if part in ANIMAL:
            self.covered = np.maximum(self.covered, alpha)
        self.name(alpha, part)

    def name(self, alpha: np.ndarray, part: str, least: float = 0.5) -> None:
        """Label the pixels where alpha is at least this."""
        self.part[alpha >= least] = PARTS.index(part)

    def fill(self, shape: Capsule, colour: Colour, part: str = "body") -> None:
        """Paint one capsule in one colour."""
        self.paint(self.coverage(shape.distance(self.x, self.y)), colour, part)

    def picture(self) -> Image.Image:
        """What is drawn, RGB."""
        return Image.fromarray((np.clip(self.rgb, 0, 1) * 255 + 0.5).astype(np.uint8), "RGB")

    def mask(self) -> Image.Image:
        """Where the animal is: a 1-bit picture."""
        return Image.fromarray(self.covered >= 0.5)
