"""The same animal twice: in one scene, or in two pictures of a series."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from kvinv_pl.menagerie.drawn.drawing import Canvas
from kvinv_pl.menagerie.drawn.poses import ACTIONS
from kvinv_pl.menagerie.drawn.world import Animal

RELATIONS = ("beside", "above", "and")  # of the first of two animals to the second


def another_action(action: str, rng: np.random.Generator) -> str:
    """Any other action, each as likely."""
    others = [other for other in ACTIONS if other != action]
    return others[int(rng.integers(len(others)))]


def acting_otherwise(seed: int) -> Animal:
    """The animal of this seed in its own scene and in another action than its own; equal on every machine."""
    animal = Animal.sample(seed)
    return replace(animal, action=another_action(animal.action, np.random.default_rng((seed, 3))))


@dataclass(frozen=True)
class Twice:
    """Both in one scene, at half the animal's usual size.

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
        """The true picture, RGB, `size` pixels a side (None: the model's)."""
        return self.drawn(size).picture()

    def mask(self, size: int | None = None) -> Image.Image:
        """Where the two are, without their shadows: a 1-bit picture."""
        return self.drawn(size).mask()

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
