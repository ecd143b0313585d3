"""What psi could bring at most: tuned on moved views of the source, or on the true picture of the edit.

    python tools/tuning_on_views.py --cases 8

KV Inversion tunes psi where the source's queries stand, and an edit reads it where its own do. Here K-bar
and V-bar of the source must also reconstruct other pictures that read them: the source turned, shifted,
scaled or mirrored, each on its own inverted trajectory (`gentle`, `strong`), or the true picture of the edit
under the target prompt (`truth`), which no user has: a bound of what any tuning of psi can bring. Prints one
row for each, beside no tuning and the usual one, with the figures of `tools/bench_actions.py`; a sheet lies
in `--work`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from calling import call
from PIL import Image
from scoring import Row, table
from torch import Tensor

from kvinv_pl.algorithm.inversion import invert
from kvinv_pl.algorithm.tuning import squared_errors
from kvinv_pl.data.images.geometry import Geometry, to_image, to_pixels
from kvinv_pl.menagerie.case import Case
from kvinv_pl.training.module import KVInversion

RATE = 0.03
VIEWS: dict[str, list[dict[str, float]]] = {  # degrees, factors, and halves of the side
    "gentle": [
        {"turn": 8, "right": 0.06},
        {"turn": -8, "down": 0.06},
        {"scale": 1.1, "right": -0.08},
        {"scale": 0.92, "shear": 0.12},
    ],
    "strong": [
        {"mirror": 1},
        {"turn": 25, "scale": 1.1},
        {"turn": -20, "right": 0.25, "down": -0.2, "scale": 0.9},
        {"right": -0.25, "down": 0.1, "shear": 0.4},
    ],
}


def moved(
    x: Tensor, turn: float = 0, scale: float = 1, right: float = 0, down: float = 0, shear: float = 0,
    mirror: float = 0,
) -> Tensor:  # fmt: skip
    """The pictures (n, 3, h, w) under one affine map; what comes in from outside is their mirror image."""
    a = math.radians(turn)
    map_ = torch.tensor(
        [[math.cos(a), shear - math.sin(a), right], [math.sin(a), math.cos(a), down]], dtype=x.dtype
    )
    map_[:, :2] /= scale
    map_[:, 0] *= 1 - 2 * mirror
    grid = F.affine_grid(map_.expand(len(x), -1, -1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


class Trial:
    """Cases side by side in the slots of one network, tuned and edited without the disk."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases, model = cases, KVInversion()
        self.guidance = model.editing.guidance
        self.backbone = model.load_backbone(torch.float32)
        self.denoiser, self.table = model.denoiser, model.denoiser.table
        size = cases[0].animal.render().size
        self.geometry = Geometry(size, size)
        self.source = self.backbone.embed([case.animal.prompt() for case in cases])
        self.target = self.backbone.embed([case.animal.prompt(case.target) for case in cases])
        self.pictures = self._pixels([case.animal.render() for case in cases])
        self.pivots = self._trajectory(self.pictures, self.source)

    def _pixels(self, pictures: list[Image.Image]) -> Tensor:
        return torch.stack([to_pixels(picture, self.geometry) for picture in pictures])

    @torch.no_grad()
    def _trajectory(self, pixels: Tensor, context: Tensor) -> Tensor:
        z_0 = self.backbone.encode(pixels)
        return invert(lambda z, t: self.backbone.predict(z, t, context), z_0, self.table)

    def _readers(self, kind: str) -> tuple[list[Tensor], Tensor]:
        """The trajectories of what reads the source's K-bar and V-bar in tuning, and all rows' prompts."""
        if kind == "truth":
            truth = self._pixels([case.animal.render(case.target) for case in self.cases])
            return [self._trajectory(truth, self.target)], torch.cat([self.source, self.target])
        views = VIEWS.get(kind, [])
        trajectories = [self._trajectory(moved(self.pictures, **view), self.source) for view in views]
        return trajectories, self.source.repeat(1 + len(views), 1, 1)

    def edits(self, kind: str, inner_steps: int) -> list[Image.Image]:
        """The edits, psi having been tuned with these readers for so many steps at each timestep."""
        readers, contexts = self._readers(kind)
        n, total = len(self.cases), len(self.table)
        attachment = self.denoiser.place((self.pivots.shape[-2], self.pivots.shape[-1]), n)
        self.denoiser.reset(0, [str(case.animal.seed) for case in self.cases], [0] * n)
        learned, z, bars = list(self.denoiser.psi.parameters()), self.pivots[total], []
        for i in range(total):
            rows = torch.cat([z, *(reader[total - i] for reader in readers)])
            aims = torch.cat([levels[total - i - 1] for levels in (self.pivots, *readers)])
            optimizer, t = torch.optim.Adam(learned, RATE), self.table.timesteps[i]
            for _ in range(inner_steps):
                optimizer.zero_grad()
                with attachment.replaying(1, [0] * len(readers)) if readers else attachment.blend():
                    eps = self.backbone.predict(rows, t.expand(len(rows)), contexts)
                errors = squared_errors(aims, self.table.forward(rows, eps, i)).view(-1, n)
                (errors[0].sum() + (errors[1:].mean(0).sum() if readers else 0)).backward()
                optimizer.step()
            with torch.no_grad(), attachment.blend(record=True) as kv:
                z = self.table.forward(z, self.backbone.predict(z, t.expand(n), self.source), i)
            bars.append(kv)
        return self._edited(bars)

    @torch.no_grad()
    def _edited(self, bars: list[Any]) -> list[Image.Image]:
        """Guided from the source, reading K-bar and V-bar of each step."""
        n, z, contexts = len(self.cases), self.pivots[-1], torch.cat([self.source, self.target])
        attachment = self.denoiser.attached()
        for i, kv in enumerate(bars):
            with attachment.frozen({path: (k[[0, 0]], v[[0, 0]]) for path, (k, v) in kv.items()}):
                t = self.table.timesteps[i].expand(2 * n)
                source, target = self.backbone.predict(z.repeat(2, 1, 1, 1), t, contexts).chunk(2)
            z = self.table.forward(z, source + self.guidance * (target - source), i)
        return [to_image(picture, self.geometry) for picture in self.backbone.decode(z)]


def views(cases: int = 8, seed_base: int = 930_000, work: Path = Path("work_views"), steps: int = 4) -> None:
    """Print the table and write the sheet.

    Args:
        cases: How many.
        seed_base: The first seed; 900,000 to 999,999 are for choosing.
        work: Where the sheet is written.
        steps: Optimiser steps at each timestep; the usual tuning has 3.
    """
    drawn = [Case.of_seed(seed) for seed in range(seed_base, seed_base + cases)]
    trial = Trial(drawn)
    ways = {"nothing learned": ("", 0), "the usual tuning": ("", 3)}
    ways |= {f"with {kind} views": (kind, steps) for kind in VIEWS} | {"with the truth": ("truth", steps)}
    rows = [Row(name, trial.edits(*way), {}) for name, way in ways.items()]
    print(table({row.name: row.figures(drawn) for row in rows}))
    work.mkdir(parents=True, exist_ok=True)
    lines = [
        np.concatenate([np.asarray(picture.convert("RGB")) for picture in pictures], 1)
        for pictures in zip(
            [case.animal.render() for case in drawn],
            [case.animal.render(case.target) for case in drawn],
            *[row.pictures for row in rows],
            strict=True,
        )
    ]
    Image.fromarray(np.concatenate(lines)).save(work / "sheet.png")
    print(f"{work / 'sheet.png'}: source, truth, {', '.join(ways)}")


if __name__ == "__main__":
    call(views)
