"""What the benches of edits measure: cases of the embedded world, and the figures of one way of editing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from kvinv_pl.menagerie import ACTIONS, Animal
from kvinv_pl.menagerie.bootstrap import bootstrap_interval
from kvinv_pl.menagerie.identity import SCENERY, Identity, compare
from kvinv_pl.menagerie.judge import Judge, nearest_action
from kvinv_pl.menagerie.known import Known

COLUMNS = (
    "same animal %",
    "right action %",
    "named right %",
    "second recall",
    "second precision",
    "accent %",
    "body",
    "marks %",
    "scene %",
    "frame dB",
    "animal dB",
    "background dB",
    "reconstruction dB",
    "tune s",
    "edit s",
)


@dataclass
class Case:
    """An animal, the action it is seen in, and the one it is to be shown in."""

    animal: Animal
    target: str
    _known: dict[int, Known] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of_seed(cls, seed: int) -> Case:
        """The case of a seed: the target is any of the other four actions."""
        animal = Animal.sample(seed)
        others = [action for action in ACTIONS if action != animal.action]
        return cls(animal, others[int(np.random.default_rng(seed + 1).integers(len(others)))])

    def identity(self, picture: Image.Image) -> Identity:
        """Whether the picture shows the same animal in the target action."""
        size = picture.width
        if size not in self._known:
            self._known[size] = Known(self.animal, self.target, size)
        return compare(picture, self._known[size])

    def score(self, picture: Image.Image) -> dict[str, float]:
        """Against what was drawn: the action, identity, and PSNR in dB on frame, animal and background."""
        truth = self.animal.render(self.target, picture.width)
        masks = [
            np.array(self.animal.mask(action, picture.width)) for action in (self.target, self.animal.action)
        ]
        error = ((np.asarray(picture, np.float64) - np.asarray(truth, np.float64)) / 255) ** 2
        parts = {"frame": np.ones_like(masks[0]), "animal": masks[0], "background": ~(masks[0] | masks[1])}
        found = self.identity(picture)
        return {
            "same animal %": 100.0 * found.same_animal,
            "right action %": 100.0 * (nearest_action(picture, self.animal) == self.target),
            "second recall": found.second_recall,
            "second precision": found.second_precision,
            "accent %": 100.0 * (found.kept("accent") and found.kept("accent_elsewhere")),
            "body": found.body,
            "marks %": np.nan if self.animal.coat == "plain" else 100.0 * found.kept("marks_off"),
            "scene %": 100.0 * all(found.kept(part) for part in SCENERY),
            **{
                f"{name} dB": -10 * float(np.log10(error[part].mean() + 1e-10))
                for name, part in parts.items()
            },
        }


@dataclass
class Row:
    """One way of editing: its pictures, one a case, and what else is known of it, of each case or of all."""

    name: str
    pictures: list[Image.Image]
    extra: dict[str, Any] = field(default_factory=dict)

    def figures(self, cases: Sequence[Case]) -> dict[str, np.ndarray]:
        """Every column's values, one a case; NaN where a case has nothing to judge."""
        scores = [case.score(picture) for case, picture in zip(cases, self.pictures, strict=True)]
        figures = {key: np.array([score[key] for score in scores]) for key in scores[0]}
        named = Judge.load().names(self.pictures)
        right = [name["action"] == case.target for name, case in zip(named, cases, strict=True)]
        figures["named right %"] = 100.0 * np.array(right)
        return figures | {key: np.atleast_1d(value) for key, value in self.extra.items()}


def cell(values: np.ndarray) -> str:
    """A mean, and of several values its interval."""
    known = values[~np.isnan(values)]
    if not len(known):
        return ""
    low, high = bootstrap_interval(known)
    return f"{known.mean():.2f}" + (f" [{low:.2f}, {high:.2f}]" if len(values) > 1 else "")


def table(rows: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """The figures of named rows as a Markdown table."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, figures in rows.items():
        cells = [cell(figures[column]) if column in figures else "" for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
