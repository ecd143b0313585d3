"""The drawn world: an animal from a seed, and the true picture of that animal in every action."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from kvinv_pl.menagerie.drawing import PARTS, Canvas, Capsule
from kvinv_pl.menagerie.poses import ACTIONS, BUILDS, Build, Pose, pose

SIZE = 64  # pixels a side, that of the shipped model
SPECIES = tuple(BUILDS)
COATS = ("plain", "striped", "spotted")
GROUNDS = ("grass", "sand", "snow")
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
GROUND_COLOURS = {"grass": (0.55, 0.74, 0.40), "sand": (0.88, 0.78, 0.56), "snow": (0.93, 0.95, 0.98)}
ACCENTS = ("tail", "ears", "collar")
RELATIONS = ("beside", "above", "and")  # of the first of two animals to the second


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value), np.float32)


def _luma(rgb: np.ndarray) -> float:
    return float(rgb @ np.array([0.299, 0.587, 0.114], np.float32))


def _picture(canvas: Canvas) -> Image.Image:
    return Image.fromarray((np.clip(canvas.rgb, 0, 1) * 255 + 0.5).astype(np.uint8), "RGB")


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


@dataclass(frozen=True)
class Animal:
    """One animal of the menagerie. What its prompt names is `species`, `colour`, `coat`, `ground`, `action`.

    Everything else is its identity, which an edit must keep and no prompt tells: the exact colours, the marks
    (in coordinates that move with the trunk, so that a stripe is the same stripe in every action), the size,
    the place and the scene.
    """

    seed: int
    species: str
    colour: str
    coat: str
    ground: str
    action: str
    body: np.ndarray
    second: np.ndarray
    accent: str
    stripes: tuple[int, float]  # how many along the trunk, phase in 0..1
    spots: tuple[tuple[float, float, float], ...]  # along, across, radius
    scale: float  # one body length as a share of the picture's side
    place: tuple[float, float]  # of the point between the feet
    scene: Scene

    @classmethod
    def sample(cls, seed: int) -> Animal:
        """The animal of this seed (any non-negative integer); equal on every machine."""
        rng = np.random.default_rng(seed)
        species, colour, coat, ground, action = cls._words(rng)
        hue, saturation, value = COLOURS[colour]
        body = _rgb(
            hue + rng.uniform(-8, 8),
            float(np.clip(saturation * rng.uniform(0.85, 1.15), 0, 1)),
            float(np.clip(value * rng.uniform(0.88, 1.12), 0, 1)),
        )
        # the marks are of any hue, and lighter or darker than the body by enough to be counted
        dark = _luma(body) > 0.45
        second = _rgb(rng.uniform(0, 360), rng.uniform(0.3, 0.9), 0.25 if dark else 0.95)
        second = second * 0.9 if dark else 1 - (1 - second) * 0.6
        spots = cls._spread(rng, int(rng.integers(3, 5)))
        return cls(
            seed=seed, species=species, colour=colour, coat=coat, ground=ground, action=action,
            body=body, second=second, accent=cls._pick(rng, ACCENTS),
            stripes=(int(rng.integers(3, 5)), float(rng.uniform())), spots=spots,
            scale=float(rng.uniform(0.32, 0.375)),
            place=(float(rng.uniform(0.45, 0.50)), float(rng.uniform(0.11, 0.16))),
            scene=cls._scene(rng, ground),
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

    @staticmethod
    def _spread(rng: np.random.Generator, count: int) -> tuple[tuple[float, float, float], ...]:
        """Spots over the trunk that do not run into one another."""
        spots: list[tuple[float, float, float]] = []
        for _ in range(200):
            spot = (
                float(rng.uniform(-0.15, 1.1)),
                float(rng.uniform(-0.08, 0.14)),
                float(rng.uniform(0.115, 0.145)),
            )
            if all(math.hypot(spot[0] - s[0], spot[1] - s[1]) > spot[2] + s[2] + 0.10 for s in spots):
                spots.append(spot)
            if len(spots) == count:
                break
        return tuple(spots)

    @staticmethod
    def _scene(rng: np.random.Generator, ground: str) -> Scene:
        warm = rng.uniform() < 0.3
        top = _rgb(rng.uniform(195, 235), rng.uniform(0.25, 0.55), rng.uniform(0.8, 0.98))
        low = _rgb(rng.uniform(15, 45) if warm else rng.uniform(190, 220), rng.uniform(0.1, 0.35), 0.97)
        tint = np.array(rng.uniform(-0.04, 0.04, 3), np.float32)

        def between(low: float, high: float) -> float:
            return float(rng.uniform(low, high))

        return Scene(
            sky_top=top, sky_low=low,
            sun=(between(0.08, 0.92), between(0.80, 0.94), between(0.05, 0.09)),
            hill=(between(0.0, 1.0), between(0.06, 0.20), between(0.25, 0.5)),
            hill_colour=_rgb(rng.uniform(80, 240), rng.uniform(0.1, 0.3), rng.uniform(0.55, 0.75)),
            horizon=float(rng.uniform(0.34, 0.44)),
            ground_colour=np.clip(np.array(GROUND_COLOURS[ground], np.float32) + tint, 0, 1),
        )  # fmt: skip

    def prompt(self, action: str | None = None) -> str:
        """What a person would say of the picture, in this action or (None) in the animal's own."""
        return f"a {self.coat} {self.colour} {self.species} {self._known(action)} on {self.ground}"

    def render(self, action: str | None = None, size: int | None = None) -> Image.Image:
        """The true picture, RGB, `size` pixels a side (None: the model's), in this or its own action."""
        return _picture(self._draw(action, size))

    def mask(self, action: str | None = None, size: int | None = None) -> Image.Image:
        """Where the animal is, without its shadow: a 1-bit picture."""
        return Image.fromarray(self._draw(action, size).covered >= 0.5)

    def parts(self, action: str | None = None, size: int | None = None) -> dict[str, np.ndarray]:
        """Where each of `drawing.PARTS` is seen, boolean (size, size): every pixel is of one part."""
        seen = self._draw(action, size).part
        return {part: seen == number for number, part in enumerate(PARTS)}

    def scenery(self, size: int | None = None) -> np.ndarray:
        """What would be seen without the animal and its shadow, float32 (size, size, 3) in 0..1."""
        canvas = self._canvas(size)
        self._draw_scene(canvas)
        return np.clip(canvas.rgb, 0, 1)

    def along_trunk(self, action: str | None = None, size: int | None = None) -> np.ndarray:
        """How far along the trunk each of its pixels lies, from 0 at the hip, in shares of the picture's side.

        NaN outside the trunk; what hides the trunk is not left out.
        """
        canvas, build = self._canvas(size), BUILDS[self.species]
        held = pose(self._known(action), build)
        trunk = self._trunk(build, held)
        along = trunk.along_across(canvas.x, canvas.y)[0] * math.dist(held.hip, held.shoulder) * self.scale
        return np.where(trunk.distance(canvas.x, canvas.y) < 0, along, np.nan)

    @staticmethod
    def _check(action: str) -> str:
        if action not in ACTIONS:
            raise ValueError(f"an action of the menagerie is one of {', '.join(ACTIONS)}; got {action!r}")
        return action

    def _known(self, action: str | None) -> str:
        return self.action if action is None else self._check(action)

    def _canvas(self, size: int | None) -> Canvas:
        """In units of body lengths, with the origin on the ground between the feet."""
        size = SIZE if size is None else size
        if size < 8:
            raise ValueError(f"a picture is at least 8 pixels a side; got {size}")
        return Canvas(size, *self._window)

    def _draw(self, action: str | None, size: int | None) -> Canvas:
        canvas = self._canvas(size)
        self._draw_scene(canvas)
        self._draw_self(canvas, action)
        return canvas

    @property
    def _window(self) -> tuple[float, float, float]:
        """Left, bottom and side of the picture in body lengths, the origin on the ground between the feet."""
        return -self.place[0] / self.scale, -self.place[1] / self.scale, 1.0 / self.scale

    def _draw_self(self, canvas: Canvas, action: str | None) -> None:
        build = BUILDS[self.species]
        held = pose(self._known(action), build)
        self._draw_shadow(canvas, held)
        self._draw_animal(canvas, build, held)

    def _draw_scene(self, canvas: Canvas) -> None:
        scene, x, y = self.scene, self.place[0] + canvas.x * self.scale, self.place[1] + canvas.y * self.scale
        pixel = canvas.pixel * self.scale
        up = np.clip((y - scene.horizon) / (1 - scene.horizon), 0, 1)[..., None]
        canvas.rgb = np.broadcast_to(scene.sky_low * (1 - up) + scene.sky_top * up, canvas.rgb.shape).copy()

        def cover(distance: np.ndarray) -> np.ndarray:
            return np.broadcast_to(np.clip(0.5 - distance / pixel, 0, 1), canvas.covered.shape)

        sun_x, sun_y, sun_r = scene.sun
        canvas.paint(
            cover(np.hypot(x - sun_x, y - sun_y) - sun_r), np.array([1.0, 0.95, 0.7], np.float32), "sun"
        )
        hill_x, hill_h, hill_w = scene.hill
        canvas.paint(
            cover(y - scene.horizon - hill_h * np.exp(-(((x - hill_x) / hill_w) ** 2) * 2)),
            scene.hill_colour,
            "hill",
        )
        near = 1.0 - 0.12 * np.clip((scene.horizon - y) / scene.horizon, 0, 1)[..., None]
        canvas.paint(cover(y - scene.horizon), scene.ground_colour * near, "ground")

    def _draw_shadow(self, canvas: Canvas, held: Pose) -> None:
        middle = (held.hip[0] + held.shoulder[0]) / 2
        half = 0.35 + 0.45 * abs(held.shoulder[0] - held.hip[0])
        distance = np.hypot((canvas.x - middle) / half, (canvas.y + 0.02) / 0.13) - 1.0
        shade = 0.35 * np.clip(0.5 - distance / 0.6, 0, 1)
        canvas.paint(shade, np.array([0.12, 0.14, 0.2], np.float32), "shadow")
        canvas.name(shade, "shadow", 0.05)

    def _draw_animal(self, canvas: Canvas, build: Build, held: Pose) -> None:
        far, near = self.body * 0.72, self.body * 0.92
        r = build.leg_radius
        joints = (held.hip, held.shoulder, held.hip, held.shoulder)

        def leg(index: int, colour: np.ndarray) -> None:
            knee, foot = held.legs[index]
            top = joints[index]
            thick = r * (held.thigh if index in (0, 2) else 1.25)
            foot = (foot[0], foot[1] + r)
            canvas.fill(Capsule(top, knee, thick * 1.25, thick), colour)
            canvas.fill(Capsule(knee, foot, thick if index in (0, 2) else r * 1.1, r), colour)
            canvas.fill(Capsule(foot, (foot[0] + 0.07, foot[1]), r, r * 0.9), colour)

        leg(0, far)
        leg(1, far)
        self._draw_tail(canvas, build, held)
        self._draw_trunk(canvas, build, held)
        leg(2, near)
        leg(3, near)
        self._draw_head(canvas, build, held)

    def _draw_tail(self, canvas: Canvas, build: Build, held: Pose) -> None:
        def step(start: tuple[float, float], angle: float, length: float) -> tuple[float, float]:
            return start[0] - math.cos(angle) * length, max(start[1] + math.sin(angle) * length, 0.08)

        lean = math.atan2(held.shoulder[1] - held.hip[1], held.shoulder[0] - held.hip[0])
        base = step(held.hip, -lean * 0.8, build.girth * 0.85)
        middle = step(base, held.tail[0], build.tail * 0.45)
        tip = step(middle, held.tail[1], build.tail * 0.45)
        first, last = build.tail_radius
        half = (first + last) / 2
        canvas.fill(Capsule(base, middle, first, half), self.body * 0.86)
        canvas.fill(
            Capsule(middle, tip, half, last),
            self.second if self.accent == "tail" else self.body * 0.86,
            self._part_of("tail"),
        )

    @staticmethod
    def _trunk(build: Build, held: Pose) -> Capsule:
        return Capsule(held.hip, held.shoulder, build.girth * 1.02, build.girth * 0.94, held.bend)

    def _part_of(self, place: str) -> str:
        return "accent" if self.accent == place else "body"

    def _draw_trunk(self, canvas: Canvas, build: Build, held: Pose) -> None:
        g = build.girth
        trunk = self._trunk(build, held)
        u, v = trunk.along_across(canvas.x, canvas.y)
        colour = self.body * (0.94 + 0.22 * np.clip(v / g, -1, 1))[..., None]
        length = math.hypot(held.shoulder[0] - held.hip[0], held.shoulder[1] - held.hip[1])
        edge = canvas.pixel
        if self.coat == "striped":
            count, phase = self.stripes
            period = 1.5 / count
            offset = np.abs((u + 0.25 + phase * period) / period % 1.0 - 0.5) * period * length
            marks = np.clip(0.5 + (0.22 * period * length - offset) / edge, 0, 1)
        elif self.coat == "spotted":
            marks = np.zeros_like(u)
            for along, across, radius in self.spots:
                distance = np.hypot((u - along) * length, v - across * g / 0.30) - radius
                marks = np.maximum(marks, canvas.coverage(distance))
        else:
            marks = np.zeros_like(u)
        colour = colour * (1 - marks[..., None]) + self.second * marks[..., None]
        inside = canvas.coverage(trunk.distance(canvas.x, canvas.y))
        canvas.paint(inside, colour, "body")
        canvas.name(inside * marks, "marks")

    def _draw_head(self, canvas: Canvas, build: Build, held: Pose) -> None:
        head = (held.shoulder[0] + held.head[0], held.shoulder[1] + held.head[1])
        cos, sin = math.cos(held.nod), math.sin(held.nod)

        def at(x: float, y: float) -> tuple[float, float]:
            return head[0] + x * cos - y * sin, head[1] + x * sin + y * cos

        g, radius = build.girth, build.head
        ears = self.second if self.accent == "ears" else self.body * 0.80
        (base, tip), (r0, r1) = build.ear, build.ear_radius
        canvas.fill(Capsule(held.shoulder, head, g * 0.72, radius * 0.75), self.body)
        if self.accent == "collar":
            middle = (held.shoulder[0] * 0.42 + head[0] * 0.58, held.shoulder[1] * 0.42 + head[1] * 0.58)
            dx, dy = head[0] - held.shoulder[0], head[1] - held.shoulder[1]
            k = radius * 0.62 / math.hypot(dx, dy)
            canvas.fill(
                Capsule(
                    (middle[0] + dy * k, middle[1] - dx * k),
                    (middle[0] - dy * k, middle[1] + dx * k),
                    0.085,
                    0.085,
                ),
                self.second,
                "accent",
            )
        if tip[1] > 0:  # the far ear stands behind the head
            canvas.fill(
                Capsule(at(base[0] + 0.17, base[1]), at(tip[0] + 0.2, tip[1] * 0.97), r0, r1),
                ears * 0.85,
                self._part_of("ears"),
            )
        canvas.fill(Capsule(at(0, 0), at(build.muzzle, -0.10), radius, build.muzzle_radius), self.body)
        canvas.fill(Capsule(head, head, radius, radius), self.body)
        canvas.fill(Capsule(at(*base), at(*tip), r0, r1), ears, self._part_of("ears"))
        ink = np.array([0.06, 0.05, 0.08], np.float32)
        canvas.fill(Capsule(at(0.12, 0.07), at(0.12, 0.07), 0.055, 0.055), ink, "face")
        nose = build.muzzle + build.muzzle_radius * 0.8
        canvas.fill(Capsule(at(nose, -0.08), at(nose, -0.08), 0.05, 0.05), ink, "face")


@dataclass(frozen=True)
class Twice:
    """The same animal twice in one scene, in two actions, at half its usual size.

    In photographs much occurs twice, so that the self-attention of a model trained on them learns to carry
    texture and identity from one place to another, which is what editing by it rests on. These pictures
    teach that to the model of this world.
    """

    first: Animal
    second: Animal
    relation: str

    @classmethod
    def sample(cls, seed: int) -> Twice:
        """The animal of this seed, in its own and another action; equal on every machine."""
        animal, rng = Animal.sample(seed), np.random.default_rng((seed, 2))
        others = [action for action in ACTIONS if action != animal.action]
        other = others[int(rng.integers(len(others)))]
        relation = RELATIONS[int(rng.integers(len(RELATIONS)))]

        def near(value: float, by: float) -> float:
            return float(value + rng.uniform(-by, by))

        scene = animal.scene
        if relation == "beside":  # the first stands left
            scale, places = near(0.167, 0.012), [(near(0.245, 0.02), near(0.13, 0.03)) for _ in range(2)]
            places[1] = (places[1][0] + 0.49, places[1][1])
        else:  # the first stands above, which is farther away; the ground reaches up to there
            scene = replace(scene, horizon=near(0.64, 0.05))
            aside = 0.2 if relation == "and" else 0.0
            aside *= 1 if rng.uniform() < 0.5 else -1
            scale = near(0.19, 0.012) if relation == "above" else near(0.205, 0.015)
            places = [
                (near(0.48 + aside, 0.03), near(0.51, 0.015)),
                (near(0.48 - aside, 0.03), near(0.055, 0.015)),
            ]
        one, two = (replace(animal, scale=scale, place=place, scene=scene) for place in places)
        one, two = replace(one, action=animal.action), replace(two, action=other)
        if relation == "and" and rng.uniform() < 0.5:
            one, two = two, one
        return cls(one, two, relation)

    @property
    def seed(self) -> int:
        """The seed of the animal."""
        return self.first.seed

    def prompt(self) -> str:
        """What a person would say of the picture."""
        one, two = self.first, self.second
        return (
            f"a {one.coat} {one.colour} {one.species} {one.action} {self.relation} "
            f"the same {two.species} {two.action} on {one.ground}"
        )

    def render(self, size: int | None = None) -> Image.Image:
        """The true picture, RGB, `size` pixels a side (None: the model's)."""
        return _picture(self._draw(size))

    def mask(self, size: int | None = None) -> Image.Image:
        """Where the two are, without their shadows: a 1-bit picture."""
        return Image.fromarray(self._draw(size).covered >= 0.5)

    def _draw(self, size: int | None) -> Canvas:
        far, near = sorted((self.first, self.second), key=lambda animal: -animal.place[1])
        canvas = far._draw(None, size)
        canvas.look(*near._window)
        near._draw_self(canvas, None)
        return canvas
