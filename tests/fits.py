"""Small fits for tests: a drawn picture, the tiny checkpoint, a quiet trainer and a run folder."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.stages.settings import EditSettings
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.trainer import KVTrainer

SOURCE = "a cat standing"
TARGET = "a cat running"
QUICK: dict[str, Any] = {
    "steps": 3,
    "guidance": 2.0,
    "inner_steps": 3,
    "tolerance": 0.0,
    "tolerance_growth": 0.0,
    "store_dtype": "float32",
    "retries": 0,
}
_home = Path(tempfile.mkdtemp(prefix="kvinv-fits-"))
atexit.register(shutil.rmtree, _home, ignore_errors=True)
_made: dict[str, Path] = {}

UNTUNED = float("inf")
"""A tolerance at which everything has converged before it begins."""


def adam(lr: float = 0.1) -> Any:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def checkpoint(**scheduler: Any) -> Path:
    """The tiny checkpoint with latents of about unit variance, as a trained VAE has; nobody may change it."""
    name = "-".join(["tiny", *(f"{key}-{value}" for key, value in scheduler.items())])
    if name not in _made:
        folder = checkpoints.make("tiny", _home / name)
        checkpoints.change_json(folder / "vae" / "config.json", scaling_factor=5.0)
        checkpoints.change_json(folder / "scheduler" / "scheduler_config.json", **scheduler)
        _made[name] = folder
    return _made[name]


def picture(path: Path, size: tuple[int, int] = (16, 16), seed: int = 0) -> Path:
    """A picture of soft colours, other for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def pictures(folder: Path, names: Iterable[str]) -> Path:
    """A folder of pictures of these names, each like no other."""
    for seed, name in enumerate(names):
        picture(folder / f"{name}.png", seed=seed)
    return folder


def model(**settings: Any) -> KVInversion:
    """The module on the tiny checkpoint, or on the one named."""
    given: dict[str, Any] = {"optimizer": adam(), **QUICK, **settings}
    given.setdefault("checkpoint", str(checkpoint()))
    return KVInversion(**given)


def trainer(**options: Any) -> KVTrainer:
    return KVTrainer(**{"accelerator": "cpu", "logger": False, "quiet": True, **options})


def fit(image: Path, out: Path, module: KVInversion | None = None, **settings: Any) -> RunStore:
    """Invert and tune; `settings` are the module's."""
    trainer().fit(module or model(**settings), datamodule=SourceImages(str(image), SOURCE, out=str(out)))
    return RunStore(out)


def fit_all(folder: Path, out: Path, **settings: Any) -> dict[str, RunStore]:
    """Invert and tune what lies in a folder, or in a list: the runs, by the names of the pictures."""
    trainer().fit(model(**settings), datamodule=SourceImages(str(folder), SOURCE, out=str(out)))
    return {path.name: RunStore(path) for path in sorted(out.iterdir()) if path.is_dir()}


def infos(store: RunStore) -> list[dict[str, Any]]:
    """What each step of a run says of itself, as far as they are done."""
    return [store.step_info(i) for i in sorted(store.done())]


def finished(out: Path) -> RunStore:
    """A copy of the run that `fit` makes of `picture` named cat.png with nothing else given; made once."""
    return RunStore(shutil.copytree(_finished(), out))


@cache
def _finished() -> Path:
    return fit(picture(_home / "finished" / "cat.png"), _home / "finished" / "run").folder


def edit(
    store: RunStore, *targets: str, module: KVInversion | None = None, **settings: Any
) -> list[Image.Image]:
    """Edit a tuned run, and open what came of it; one loaded module serves most."""
    names = {setting.name for setting in fields(EditSettings)}
    module = module or (_editor() if settings.keys() <= names else model(**settings))
    asked = replace(module.editing, **{name: settings[name] for name in settings.keys() & names})
    data = SourceImages(run=str(store.folder), targets=list(targets or [TARGET]), overwrite=True)
    trainer().edit(module, data, asked)
    return [opened(path) for path in module.last_edits]


@cache
def _editor() -> KVInversion:
    return model()


def tensors(store: RunStore) -> dict[str, str]:
    """The digest of the trajectory and of every phase: z-tilde, psi, K-bar, V-bar and the figures."""
    digests = {}
    for file in [store.folder / "trajectory.safetensors", *(store.folder / "steps").iterdir()]:
        with safe_open(file, "pt") as opened:
            digests[file.name] = opened.metadata()["digest"]
    return digests


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def levels(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())
