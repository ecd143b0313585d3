"""What is behind an animal: how it is chosen, and how it is drawn."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

from kvinv_pl.menagerie.drawn.drawing import Canvas, Point

GROUND_COLOURS = {"grass": (0.55, 0.74, 0.40), "sand": (0.88, 0.78, 0.56), "snow": (0.93, 0.95, 0.98)}
SUN = np.array([1.0, 0.95, 0.7], np.float32)


def rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """A colour of a hue in degrees, float32 (3,)."""
    return np.array(colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value), np.float32)


@dataclass(frozen=True)
class Scene:
    """What is behind the animal: sky, sun, hill, ground; in shares of the picture's side, y up."""

    sky_top: np.ndarray
    sky_low: np.ndarray
    sun: tuple[float, float, float]  # x, y, radius
    hill: tuple[float, float, float]  # x, height over the horizon, half width
    hill_colour: np.ndarray
    horizon: float
    ground_colour: np.ndarray

    @classmethod
    def sample(cls, rng: np.random.Generator, ground: str) -> Scene:
        """A scene on grass, sand or snow."""
        warm = rng.uniform() < 0.3
        top = rgb(rng.uniform(195, 235), rng.uniform(0.25, 0.55), rng.uniform(0.8, 0.98))
        low = rgb(rng.uniform(15, 45) if warm else rng.uniform(190, 220), rng.uniform(0.1, 0.35), 0.97)
        tint = np.array(rng.uniform(-0.04, 0.04, 3), np.float32)

        def between(low: float, high: float) -> float:
            return float(rng.uniform(low, high))

        return cls(
            sky_top=top, sky_low=low,
            sun=(between(0.08, 0.92), between(0.80, 0.94), between(0.05, 0.09)),
            hill=(between(0.0, 1.0), between(0.06, 0.20), between(0.25, 0.5)),
            hill_colour=rgb(rng.uniform(80, 240), rng.uniform(0.1, 0.3), rng.uniform(0.55, 0.75)),
            horizon=float(rng.uniform(0.34, 0.44)),
            ground_colour=np.clip(np.array(GROUND_COLOURS[ground], np.float32) + tint, 0, 1),
        )  # fmt: skip

    def draw(self, canvas: Canvas, place: Point, scale: float) -> None:
        """Fill a canvas in units of `scale` shares of the picture's side, whose origin is at `place`."""
        x, y = place[0] + canvas.x * scale, place[1] + canvas.y * scale
        pixel = canvas.pixel * scale
        up = np.clip((y - self.horizon) / (1 - self.horizon), 0, 1)[..., None]
        canvas.rgb = np.broadcast_to(self.sky_low * (1 - up) + self.sky_top * up, canvas.rgb.shape).copy()

        def cover(distance: np.ndarray) -> np.ndarray:
            return np.broadcast_to(np.clip(0.5 - distance / pixel, 0, 1), canvas.covered.shape)

        sun_x, sun_y, sun_r = self.sun
        canvas.paint(cover(np.hypot(x - sun_x, y - sun_y) - sun_r), SUN, "sun")
        hill_x, hill_h, hill_w = self.hill
        over = y - self.horizon - hill_h * np.exp(-(((x - hill_x) / hill_w) ** 2) * 2)
        canvas.paint(cover(over), self.hill_colour, "hill")
        near = 1.0 - 0.12 * np.clip((self.horizon - y) / self.horizon, 0, 1)[..., None]
        canvas.paint(cover(y - self.horizon), self.ground_colour * near, "ground")
