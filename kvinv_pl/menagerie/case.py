"""A case of the drawn world: an animal, the action that it is to be shown in, and how a picture scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image

from kvinv_pl.menagerie.analysis.truth import Truth
from kvinv_pl.menagerie.classifier import Classifier, nearest_action
from kvinv_pl.menagerie.drawn.twice import another_action
from kvinv_pl.menagerie.drawn.world import Animal
from kvinv_pl.menagerie.identity import SCENERY, Identity, compare


@dataclass
class Case:
    """An animal, the action it is seen in, and the one it is to be shown in."""

    animal: Animal
    target: str
    _truths: dict[int, Truth] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of_seed(cls, seed: int) -> Case:
        """The case of a seed: the target is any of the other four actions."""
        animal = Animal.sample(seed)
        return cls(animal, another_action(animal.action, np.random.default_rng(seed + 1)))

    def identity(self, picture: Image.Image) -> Identity:
        """Whether the picture shows the same animal in the target action."""
        size = picture.width
        if size not in self._truths:
            self._truths[size] = Truth(self.animal, self.target, size)
        return compare(picture, self._truths[size])

    def animals(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the animal is in the target action and in its own, boolean (size, size)."""
        target, source = (
            np.array(self.animal.mask(action, size)) for action in (self.target, self.animal.action)
        )
        return target, source

    def score(self, picture: Image.Image) -> dict[str, float]:
        """Against what was drawn: the action, identity, and PSNR in dB on frame, animal and background."""
        truth = self.animal.render(self.target, picture.width)
        animal, source = self.animals(picture.width)
        error = ((np.asarray(picture, np.float64) - np.asarray(truth, np.float64)) / 255) ** 2
        parts = {"frame": np.ones_like(animal), "animal": animal, "background": ~(animal | source)}
        found = self.identity(picture)
        return {
            "same animal %": 100.0 * found.same_animal,
            "right action %": 100.0 * (nearest_action(picture, self.animal) == self.target),
            "named right %": 100.0 * (classifier().names([picture])[0]["action"] == self.target),
            "second recall": found.second_recall,
            "second precision": found.second_precision,
            "accent %": 100.0 * (found.passes("accent") and found.passes("accent_elsewhere")),
            "body": found.body,
            "marks %": np.nan if self.animal.coat == "plain" else 100.0 * found.passes("marks_off"),
            "scene %": 100.0 * all(found.passes(part) for part in SCENERY),
            **{
                f"{name} dB": -10 * float(np.log10(error[part].mean() + 1e-10))
                for name, part in parts.items()
            },
        }


@cache
def classifier() -> Classifier:
    """The classifier of the embedded checkpoint, loaded once."""
    return Classifier.load()
