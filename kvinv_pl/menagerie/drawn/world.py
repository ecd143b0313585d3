"""The drawn world: an animal from a seed, and the true picture of that animal in every action."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from kvinv_pl.menagerie.drawn.drawing import PARTS, Canvas
from kvinv_pl.menagerie.drawn.figure import Figure, spots
from kvinv_pl.menagerie.drawn.poses import ACTIONS, BUILDS
from kvinv_pl.menagerie.drawn.scene import GROUND_COLOURS, Scene, rgb

SIZE = 128  # pixels a side, that of the shipped model
SPECIES = tuple(BUILDS)
COATS = ("plain", "striped", "spotted")
GROUNDS = tuple(GROUND_COLOURS)
# hue in degrees, saturation, value; an animal's own lies around it
COLOURS = {
    "red": (358, 0.80, 0.78),
    "orange": (28, 0.85, 0.95),
    "yellow": (52, 0.80, 0.93),
    "green": (140, 0.70, 0.55),
    "blue": (215, 0.75, 0.80),
    "purple": (282, 0.60, 0.66),
    "brown": (24, 0.62, 0.42),
    "grey": (210, 0.06, 0.55),
}
ACCENTS = ("tail", "ears", "collar")


def _luma(colour: np.ndarray) -> float:
    return float(colour @ np.array([0.299, 0.587, 0.114], np.float32))


@dataclass(frozen=True)
class Animal(Figure):
    """One animal of the menagerie. What its prompt names is `species`, `colour`, `coat`, `ground`, `action`.

    Everything else is its identity, which an edit must keep and no prompt tells: the exact colours, the marks
    (in coordinates that move with the trunk, so that a stripe is the same stripe in every action), the size,
    the place and the scene.
    """

    seed: int
    colour: str
    ground: str
    action: str
    scale: float  # one body length as a share of the picture's side
    place: tuple[float, float]  # of the point between the feet
    scene: Scene

    @classmethod
    def sample(cls, seed: int) -> Animal:
        """The animal of this seed (any non-negative integer); equal on every machine."""
        rng = np.random.default_rng(seed)
        species, colour, coat, ground, action = cls._words(rng)
        hue, saturation, value = COLOURS[colour]
        body = rgb(
            hue + rng.uniform(-8, 8),
            float(np.clip(saturation * rng.uniform(0.85, 1.15), 0, 1)),
            float(np.clip(value * rng.uniform(0.88, 1.12), 0, 1)),
        )
        # the marks are of any hue, and lighter or darker than the body by enough to be counted
        dark = _luma(body) > 0.45
        second = rgb(rng.uniform(0, 360), rng.uniform(0.3, 0.9), 0.25 if dark else 0.95)
        second = second * 0.9 if dark else 1 - (1 - second) * 0.6
        spread = spots(rng, int(rng.integers(3, 5)))
        return cls(
            seed=seed, species=species, colour=colour, coat=coat, ground=ground, action=action,
            body=body, second=second, accent=cls._pick(rng, ACCENTS),
            stripes=(int(rng.integers(3, 5)), float(rng.uniform())), spots=spread,
            scale=float(rng.uniform(0.32, 0.375)),
            place=(float(rng.uniform(0.45, 0.50)), float(rng.uniform(0.11, 0.16))),
            scene=Scene.sample(rng, ground),
        )  # fmt: skip

    @staticmethod
    def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    @classmethod
    def _words(cls, rng: np.random.Generator) -> list[str]:
        return [cls._pick(rng, words) for words in (SPECIES, tuple(COLOURS), COATS, GROUNDS, ACTIONS)]

    def another(self, same_scene: bool = False) -> Animal:
        """The animal of the next seed whose prompt has the very same words; or that one in this one's scene.

        In the scene of this one it is also at its place and of its size: only colours and marks are others.
        """
        ours, seed = [self.species, self.colour, self.coat, self.ground], self.seed + 1
        while self._words(np.random.default_rng(seed))[:4] != ours:
            seed += 1
        other = Animal.sample(seed)
        if not same_scene:
            return other
        return replace(other, scale=self.scale, place=self.place, scene=self.scene)

    def prompt(self, action: str | None = None) -> str:
        """The prompt of the picture, in this action or (None) in the animal's own."""
        return f"a {self.coat} {self.colour} {self.species} {self._checked_action(action)} on {self.ground}"

    def render(self, action: str | None = None, size: int | None = None) -> Image.Image:
        """The true picture, RGB, `size` pixels a side (None: the model's), in this or its own action."""
        return self.drawn(action, size).picture()

    def mask(self, action: str | None = None, size: int | None = None) -> Image.Image:
        """Where the animal is, without its shadow: a 1-bit picture."""
        return self.drawn(action, size).mask()

    def parts(self, action: str | None = None, size: int | None = None) -> dict[str, np.ndarray]:
        """Where each of `drawing.PARTS` is seen, boolean (size, size): every pixel is of one part."""
        seen = self.drawn(action, size).part
        return {part: seen == number for number, part in enumerate(PARTS)}

    def scenery(self, size: int | None = None) -> np.ndarray:
        """What would be seen without the animal and its shadow, float32 (size, size, 3) in 0..1."""
        return np.clip(self.canvas(size).rgb, 0, 1)

    def along_trunk(self, action: str | None = None, size: int | None = None) -> np.ndarray:
        """How far along the trunk each of its pixels is, 0 at the hip, in shares of the picture's side.

        NaN outside the trunk; what hides the trunk is not left out.
        """
        return self.along(self.canvas(size), self._checked_action(action)) * self.scale

    def _checked_action(self, action: str | None) -> str:
        if action is not None and action not in ACTIONS:
            raise ValueError(f"an action of the menagerie is one of {', '.join(ACTIONS)}; got {action!r}")
        return action or self.action

    @property
    def window(self) -> tuple[float, float, float]:
        """Left, bottom and side of the picture in body lengths, the origin on the ground between the feet."""
        return -self.place[0] / self.scale, -self.place[1] / self.scale, 1.0 / self.scale

    def canvas(self, size: int | None = None) -> Canvas:
        """What the animal is drawn on, empty but for its scene; `size` pixels a side (None: the model's)."""
        size = SIZE if size is None else size
        if size < 8:
            raise ValueError(f"a picture is at least 8 pixels a side; got {size}")
        canvas = Canvas(size, *self.window)
        self.scene.draw(canvas, self.place, self.scale)
        return canvas

    def drawn(self, action: str | None = None, size: int | None = None) -> Canvas:
        """What `render`, `mask` and `parts` are read from."""
        canvas = self.canvas(size)
        self.draw_on(canvas, self._checked_action(action))
        return canvas
