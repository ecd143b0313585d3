"""Where each part of an edited animal is in its source, by what was drawn: a bound of all matching."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvinv_pl.attention.attachment import Attachment
from kvinv_pl.menagerie import Animal
from kvinv_pl.menagerie.drawing import Canvas, Capsule, Colour
from kvinv_pl.menagerie.poses import BUILDS, pose


class PartsCanvas(Canvas):
    """Draws an animal and notes, for every pixel, which of its shapes is seen and where on it."""

    def __init__(self, animal: Animal, action: str, size: int) -> None:
        super().__init__(size, *animal.window)
        self.trunk = animal._trunk(build := BUILDS[animal.species], pose(action, build))
        self.shape = np.zeros((size, size), int)  # 0: no animal
        self.at = np.zeros((size, size, 2))  # along and across, in body lengths
        self._count, self._filling = 0, False
        animal.draw_on(self, action)

    def fill(self, shape: Capsule, colour: Colour, part: str = "body") -> None:
        """Note one capsule."""
        self._filling = True
        super().fill(shape, colour, part)
        self._filling = False
        self._note(shape)

    def paint(self, alpha: np.ndarray, colour: np.ndarray, part: str) -> None:
        """Note the trunk, which is the one shape that is no capsule of one colour."""
        super().paint(alpha, colour, part)
        if part == "body" and not self._filling:
            self._note(self.trunk)

    def _note(self, shape: Capsule) -> None:
        self._count += 1
        inside = self.coverage(shape.distance(self.x, self.y)) >= 0.5
        u, v = shape.along_across(self.x, self.y)
        length = np.hypot(shape.b[0] - shape.a[0], shape.b[1] - shape.a[1])
        self.shape[inside] = self._count
        self.at[inside] = np.stack([u * length, v], -1)[inside]


def correspondence(animal: Animal, target: str, grid: int, fine: int = 8) -> np.ndarray:
    """For each token of the edit, the source's token that shows the same; -1 where there is none.

    The background is where it was. (grid * grid,), row by row.
    """
    size = grid * fine
    before, after = (PartsCanvas(animal, action, size) for action in (animal.action, target))
    known = {number: np.argwhere(before.shape == number) for number in np.unique(before.shape) if number}
    found = np.full(grid * grid, -1)
    for token in range(grid * grid):
        row, column = divmod(token, grid)
        tile = np.s_[row * fine : (row + 1) * fine, column * fine : (column + 1) * fine]
        numbers, counts = np.unique(after.shape[tile], return_counts=True)
        number = int(numbers[counts.argmax()])
        if number == 0:
            found[token] = token if (before.shape[tile] == 0).mean() > 0.5 else -1
        elif number in known:
            here = after.at[tile][after.shape[tile] == number].mean(0)
            pixels = known[number]
            places = before.at[pixels[:, 0], pixels[:, 1]]
            nearest = pixels[((places - here) ** 2).sum(1).argmin()] // fine
            found[token] = nearest[0] * grid + nearest[1]
    return found


@contextmanager
def reading_what_corresponds(animal: Animal, actions: Sequence[str]) -> Iterator[None]:
    """Edits read K-bar and V-bar brought to where the edit shows the same; elsewhere their own."""
    maps: dict[int, Tensor] = {}
    original = Attachment._attend_edit

    def attend(self: Any, site: Any, q: Tensor, bars: Any, own: Any, sdpa: Any) -> Tensor:
        grid = site.grid[0]
        if grid not in maps:
            maps[grid] = torch.from_numpy(np.stack([correspondence(animal, t, grid) for t in actions]))
        at = maps[grid].repeat_interleave(q.shape[0] // len(actions), 0)[:, None, :, None].to(q.device)
        mine = own()
        edits = [bar.to(q).repeat(q.shape[0] // bar.shape[0], 1, 1, 1) for bar in bars]
        mixed = tuple(
            torch.where(at >= 0, bar.gather(2, at.clamp_min(0).expand_as(bar)), same)
            for bar, same in zip(edits, mine, strict=True)
        )
        return original(self, site, q, mixed, own, sdpa)  # pyright: ignore[reportArgumentType]

    Attachment._attend_edit = attend  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        Attachment._attend_edit = original
