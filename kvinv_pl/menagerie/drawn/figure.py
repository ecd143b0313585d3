"""How an animal is drawn: its parts in the order in which they hide each other."""

import math
from dataclasses import dataclass

import numpy as np

from kvinv_pl.menagerie.drawn.drawing import Canvas, Capsule, Point
from kvinv_pl.menagerie.drawn.poses import BUILDS, Build, Pose, pose

INK = np.array([0.06, 0.05, 0.08], np.float32)  # of the eye and the nose
SHADE = np.array([0.12, 0.14, 0.2], np.float32)


def spots(rng: np.random.Generator, count: int) -> tuple[tuple[float, float, float], ...]:
    """Spots over the trunk that do not run into one another."""
    found: list[tuple[float, float, float]] = []
    for _ in range(200):
        spot = (
            float(rng.uniform(-0.15, 1.1)),
            float(rng.uniform(-0.08, 0.14)),
            float(rng.uniform(0.115, 0.145)),
        )
        if all(math.hypot(spot[0] - s[0], spot[1] - s[1]) > spot[2] + s[2] + 0.10 for s in found):
            found.append(spot)
        if len(found) == count:
            break
    return tuple(found)


@dataclass(frozen=True)
class Figure:
    """An animal without a name, a place or a scene: its build and colours, and how they are drawn."""

    species: str
    coat: str
    body: np.ndarray
    second: np.ndarray
    accent: str
    stripes: tuple[int, float]  # how many along the trunk, phase in 0..1
    spots: tuple[tuple[float, float, float], ...]  # along, across, radius

    def draw_on(self, canvas: Canvas, action: str) -> None:
        """Draw it with its shadow, in units of body lengths, the origin on the ground between the feet."""
        build = BUILDS[self.species]
        posed = pose(action, build)
        self._draw_shadow(canvas, posed)
        self._draw_animal(canvas, build, posed)

    def along(self, canvas: Canvas, action: str) -> np.ndarray:
        """How far along the trunk each of its pixels is, 0 at the hip, in body lengths; NaN outside."""
        build = BUILDS[self.species]
        posed = pose(action, build)
        trunk = self._trunk(build, posed)
        along = trunk.along_across(canvas.x, canvas.y)[0] * math.dist(posed.hip, posed.shoulder)
        return np.where(trunk.distance(canvas.x, canvas.y) < 0, along, np.nan)

    def _draw_shadow(self, canvas: Canvas, posed: Pose) -> None:
        middle = (posed.hip[0] + posed.shoulder[0]) / 2
        half = 0.35 + 0.45 * abs(posed.shoulder[0] - posed.hip[0])
        distance = np.hypot((canvas.x - middle) / half, (canvas.y + 0.02) / 0.13) - 1.0
        shade = 0.35 * np.clip(0.5 - distance / 0.6, 0, 1)
        canvas.paint(shade, SHADE, "shadow")
        canvas.name(shade, "shadow", 0.05)

    def _draw_animal(self, canvas: Canvas, build: Build, posed: Pose) -> None:
        far, near = self.body * 0.72, self.body * 0.92
        r = build.leg_radius
        joints = (posed.hip, posed.shoulder, posed.hip, posed.shoulder)

        def leg(index: int, colour: np.ndarray) -> None:
            knee, foot = posed.legs[index]
            top = joints[index]
            thick = r * (posed.thigh if index in (0, 2) else 1.25)
            foot = (foot[0], foot[1] + r)
            canvas.fill(Capsule(top, knee, thick * 1.25, thick), colour)
            canvas.fill(Capsule(knee, foot, thick if index in (0, 2) else r * 1.1, r), colour)
            canvas.fill(Capsule(foot, (foot[0] + 0.07, foot[1]), r, r * 0.9), colour)

        leg(0, far)
        leg(1, far)
        self._draw_tail(canvas, build, posed)
        self._draw_trunk(canvas, build, posed)
        leg(2, near)
        leg(3, near)
        self._draw_head(canvas, build, posed)

    def _draw_tail(self, canvas: Canvas, build: Build, posed: Pose) -> None:
        def step(start: Point, angle: float, length: float) -> Point:
            return start[0] - math.cos(angle) * length, max(start[1] + math.sin(angle) * length, 0.08)

        lean = math.atan2(posed.shoulder[1] - posed.hip[1], posed.shoulder[0] - posed.hip[0])
        base = step(posed.hip, -lean * 0.8, build.girth * 0.85)
        middle = step(base, posed.tail[0], build.tail * 0.45)
        tip = step(middle, posed.tail[1], build.tail * 0.45)
        first, last = build.tail_radius
        half = (first + last) / 2
        canvas.fill(Capsule(base, middle, first, half), self.body * 0.86)
        canvas.fill(
            Capsule(middle, tip, half, last),
            self.second if self.accent == "tail" else self.body * 0.86,
            self._part_of("tail"),
        )

    @staticmethod
    def _trunk(build: Build, posed: Pose) -> Capsule:
        return Capsule(posed.hip, posed.shoulder, build.girth * 1.02, build.girth * 0.94, posed.bend)

    def _part_of(self, place: str) -> str:
        return "accent" if self.accent == place else "body"

    def _draw_trunk(self, canvas: Canvas, build: Build, posed: Pose) -> None:
        g = build.girth
        trunk = self._trunk(build, posed)
        u, v = trunk.along_across(canvas.x, canvas.y)
        colour = self.body * (0.94 + 0.22 * np.clip(v / g, -1, 1))[..., None]
        length = math.hypot(posed.shoulder[0] - posed.hip[0], posed.shoulder[1] - posed.hip[1])
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

    def _draw_head(self, canvas: Canvas, build: Build, posed: Pose) -> None:
        head = (posed.shoulder[0] + posed.head[0], posed.shoulder[1] + posed.head[1])
        cos, sin = math.cos(posed.nod), math.sin(posed.nod)

        def at(x: float, y: float) -> Point:
            return head[0] + x * cos - y * sin, head[1] + x * sin + y * cos

        g, radius = build.girth, build.head
        ears = self.second if self.accent == "ears" else self.body * 0.80
        (base, tip), (r0, r1) = build.ear, build.ear_radius
        canvas.fill(Capsule(posed.shoulder, head, g * 0.72, radius * 0.75), self.body)
        if self.accent == "collar":
            middle = (posed.shoulder[0] * 0.42 + head[0] * 0.58, posed.shoulder[1] * 0.42 + head[1] * 0.58)
            dx, dy = head[0] - posed.shoulder[0], head[1] - posed.shoulder[1]
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
        canvas.fill(Capsule(at(0.12, 0.07), at(0.12, 0.07), 0.055, 0.055), INK, "face")
        nose = build.muzzle + build.muzzle_radius * 0.8
        canvas.fill(Capsule(at(nose, -0.08), at(nose, -0.08), 0.05, 0.05), INK, "face")
