"""Small fits for tests: a drawn picture, the tiny checkpoint, a quiet trainer and a run folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import torch
from PIL import Image

from kvinv_pl.data import SourceImages
from kvinv_pl.module import KVInversion
from kvinv_pl.store import RunStore
from kvinv_pl.trainer import KVTrainer

SOURCE = "a cat standing"
TARGET = "a cat running"
QUICK: dict[str, Any] = {
    "steps": 3,
    "guidance": 2.0,
    "inner_steps": 3,
    "tolerance": 0.0,
    "tolerance_growth": 0.0,
    "store_dtype": "float32",
}
UNTUNED = float("inf")
"""A tolerance at which everything has converged before it begins."""


def adam(lr: float = 3e-2) -> Any:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def checkpoint() -> Path:
    """The tiny checkpoint, which nobody may change."""
    return checkpoints.make("tiny", Path(tempfile.gettempdir()) / f"kvinv-{checkpoints._home.name}")


def picture(path: Path, size: tuple[int, int] = (16, 16), seed: int = 0) -> Path:
    """A picture of soft colours, other for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def model(**settings: Any) -> KVInversion:
    """The module on the tiny checkpoint, or on the one named."""
    given = {"checkpoint": str(checkpoint()), "optimizer": adam(), **QUICK, **settings}
    return KVInversion(**given)


def trainer(**options: Any) -> KVTrainer:
    return KVTrainer(**{"accelerator": "cpu", "logger": False, "quiet": True, **options})


def fit(image: Path, out: Path, module: KVInversion | None = None, **settings: Any) -> RunStore:
    """Invert and tune; `settings` are the module's."""
    trainer().fit(module or model(**settings), datamodule=SourceImages(str(image), SOURCE, out=str(out)))
    return RunStore(out)


def edit(
    store: RunStore, *targets: str, module: KVInversion | None = None, **settings: Any
) -> list[Image.Image]:
    """Edit a tuned run, and open what came of it."""
    module = module or model(**settings)
    trainer().edit(module, SourceImages(run=str(store.folder), targets=list(targets or [TARGET])))
    return [Image.open(path).convert("RGB") for path in module.last_edits]


def levels(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())
