"""The same animal twice: in one scene, or in a series of two pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from kvinv_pl.menagerie.drawing import Canvas
from kvinv_pl.menagerie.poses import ACTIONS
from kvinv_pl.menagerie.world import Animal

RELATIONS = ("beside", "above", "and")  # of the first of two animals to the second


class Strip:
    """Pictures side by side, read as one."""

    def __init__(self, *canvases: Canvas) -> None:
        self.canvases = canvases

    def picture(self) -> Image.Image:
        """What is drawn, RGB."""
        return Image.fromarray(np.concatenate([np.asarray(c.picture()) for c in self.canvases], 1), "RGB")

    def mask(self) -> Image.Image:
        """Where the animal is: a 1-bit picture."""
        return Image.fromarray(np.concatenate([np.asarray(c.mask()) for c in self.canvases], 1))


@dataclass(frozen=True)
class Pair:
    """The same animal in two actions, in one picture.

    In photographs much occurs twice, so that the self-attention of a model trained on them learns to carry
    texture and identity from one place to another, which is what editing by it rests on. These pictures
    teach that to the model of this world.
    """

    first: Animal
    second: Animal
    relation: str

    @property
    def seed(self) -> int:
        """The seed of the animal."""
        return self.first.seed

    def prompt(self) -> str:
        """The prompt of the picture."""
        one, two = self.first, self.second
        return (
            f"a {one.coat} {one.colour} {one.species} {one.action} {self.relation} "
            f"the same {two.species} {two.action} on {one.ground}"
        )

    def render(self, size: int | None = None) -> Image.Image:
        """The true picture, RGB, `size` pixels high (None: the model's)."""
        return self.drawn(size).picture()

    def mask(self, size: int | None = None) -> Image.Image:
        """Where the two are, without their shadows: a 1-bit picture."""
        return self.drawn(size).mask()

    def drawn(self, size: int | None = None) -> Canvas | Strip:
        """What `render` and `mask` are read from."""
        raise NotImplementedError


def another_action(action: str, rng: np.random.Generator) -> str:
    """Any other action, each as likely."""
    others = [other for other in ACTIONS if other != action]
    return others[int(rng.integers(len(others)))]


class Twice(Pair):
    """Both in one scene, at half the animal's usual size."""

    @classmethod
    def sample(cls, seed: int) -> Twice:
        """The animal of this seed, in its own and another action; equal on every machine."""
        animal, rng = Animal.sample(seed), np.random.default_rng((seed, 2))
        other = another_action(animal.action, rng)
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

    def drawn(self, size: int | None = None) -> Canvas:
        """What `render` and `mask` are read from."""
        far, near = sorted((self.first, self.second), key=lambda animal: -animal.place[1])
        canvas = far.canvas(size)
        for animal in (far, near):
            canvas.set_view(*animal.window)
            animal.draw_on(canvas, animal.action)
        return canvas


class Series(Pair):
    """Two pictures of the animal at its own size, side by side, as a photographer takes a series.

    Together they are twice as wide as high, and only the action differs between them.
    """

    @classmethod
    def sample(cls, seed: int) -> Series:
        """The animal of this seed, in its own and another action; equal on every machine."""
        animal, rng = Animal.sample(seed), np.random.default_rng((seed, 3))
        return cls(animal, replace(animal, action=another_action(animal.action, rng)), "and")

    def drawn(self, size: int | None = None) -> Strip:
        """What `render` and `mask` are read from."""
        return Strip(self.first.drawn(size=size), self.second.drawn(size=size))
