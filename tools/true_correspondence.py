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
from kvinv_pl.menagerie.drawn.drawing import Canvas, Capsule, Colour
from kvinv_pl.menagerie.drawn.poses import BUILDS, pose


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


def correspondence(before: PartsCanvas, after: PartsCanvas, grid: int) -> np.ndarray:
    """For each token of the edit, the source's token that shows the same; -1 where there is none.

    The background is where it was. (grid * grid,), row by row; the side of both is a multiple of `grid`.
    """
    fine = len(after.shape) // grid

    def tiles(values: np.ndarray) -> np.ndarray:
        rows = values.reshape(grid, fine, grid, fine, -1).swapaxes(1, 2)
        return rows.reshape(grid * grid, fine * fine, -1)

    shapes, places = tiles(after.shape)[..., 0], tiles(after.at)
    scenery = (tiles(before.shape)[..., 0] == 0).mean(1) > 0.5
    known = dict[int, tuple[np.ndarray, np.ndarray]]()
    for number in np.unique(before.shape[before.shape > 0]):
        pixels = np.argwhere(before.shape == number)
        known[int(number)] = pixels, before.at[pixels[:, 0], pixels[:, 1]]
    found = np.full(grid * grid, -1)
    for token, shape in enumerate(shapes):
        number = int(np.bincount(shape).argmax())
        if number == 0 and scenery[token]:
            found[token] = token
        elif number in known:
            pixels, at = known[number]
            here = places[token][shape == number].mean(0)
            row, column = pixels[((at - here) ** 2).sum(1).argmin()] // fine
            found[token] = row * grid + column
    return found


@contextmanager
def reading_what_corresponds(animal: Animal, actions: Sequence[str]) -> Iterator[None]:
    """Edits read K-bar and V-bar brought to where the edit shows the same; elsewhere their own."""
    maps: dict[int, Tensor] = {}
    original = Attachment._attend_edit

    def attend(self: Any, site: Any, q: Tensor, bars: Any, own: Any, sdpa: Any) -> Tensor:
        grid = site.grid[0]
        if grid not in maps:
            before, *edits = (PartsCanvas(animal, t, 8 * grid) for t in (animal.action, *actions))
            maps[grid] = torch.from_numpy(np.stack([correspondence(before, after, grid) for after in edits]))
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
