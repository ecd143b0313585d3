"""Whole runs through the trainer: what Lightning adds to a step, what an edit costs, what a dtype loses."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback

from kvinv_pl.algorithm.tuning import reconstruct, squared_errors
from kvinv_pl.data.run_store import RunStore
from kvinv_pl.menagerie import ACTIONS, Animal
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.trainer import KVTrainer

NEVER: dict[str, Any] = {"tolerance": 0.0, "tolerance_growth": 0.0}


class StepTimes(Callback):
    """Seconds from the start of one inner step to the start of the next."""

    def __init__(self) -> None:
        """Nothing was timed."""
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Between two phases there is more than a step."""
        self._last = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def picture(folder: Path, seed: int, size: int | None = None) -> tuple[Path, str]:
    """An animal drawn into the folder, and its prompt; None: of the size that the embedded model knows."""
    animal = Animal.sample(seed)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = animal.render()
    drawn.resize((size, size) if size else drawn.size).save(folder / f"{seed}.png")
    return folder / f"{seed}.png", animal.prompt()


def steps_with_and_without_lightning(
    checkpoint: Path, folder: Path, inner_steps: int, rounds: int
) -> list[tuple[float, float]]:
    """For each round, the median seconds of an inner step in the trainer and in a loop of plain torch."""
    image, source = picture(folder, 900_000)
    found = []
    for n in range(rounds + 1):  # the first is not counted
        module = KVInversion(str(checkpoint), steps=2, inner_steps=inner_steps, **NEVER)
        times = StepTimes()
        trainer = KVTrainer(accelerator="cpu", logger=False, quiet=True, callbacks=[times])
        out = folder / f"run-{n}"
        trainer.fit(module, datamodule=SourceImages(str(image), source, out=str(out)))
        plain = _plain_steps(module, RunStore(out), source, inner_steps)
        if n:
            found.append((statistics.median(times.seconds), statistics.median(plain)))
    return found


def _plain_steps(module: KVInversion, store: RunStore, source: str, inner_steps: int) -> list[float]:
    """The first phase once more, without Lightning."""
    denoiser, z = module.denoiser, store.trajectory()[:, None]
    contexts = denoiser.backbone.embed(["", source])[:, None]
    eps = denoiser.guided_eps(contexts, module.tuning.guidance)
    for cp in denoiser.cps:
        cp.reset()
    adam, seconds = torch.optim.Adam(list(denoiser.psi.parameters()), lr=1e-2), []
    for _ in range(inner_steps):
        began = time.perf_counter()
        with denoiser.attached().blend(), denoiser.cache.kept():
            errors = squared_errors(z[-2], reconstruct(eps, z[-1], denoiser.table, 0))
            if float(errors.detach().max()) / z[0].numel() <= 0:
                break
            adam.zero_grad()
            errors.sum().backward()
            adam.step()
        seconds.append(time.perf_counter() - began)
    denoiser.cache.forget()
    return seconds[1:]


def edits(
    checkpoint: str, folder: Path, steps: int, size: int | None
) -> Callable[[Literal["stored", "replayed"] | None, int], Callable[[], float]]:
    """Edits of one tuned picture to some targets at once, each giving the seconds of one target.

    Called with where K-bar and V-bar come from, or None for plain DDIM, and the number of targets, up to 5.
    """
    image, source = picture(folder, 900_000, size)
    settings: dict[str, Any] = {"steps": steps, "tolerance": float("inf")}
    module, out = KVInversion(checkpoint, **settings), folder / "run"
    KVTrainer(accelerator="auto", logger=False, quiet=True).fit(
        module, datamodule=SourceImages(str(image), source, out=str(out))
    )
    asked = [source.replace(Animal.sample(900_000).action, action) for action in ACTIONS]

    def prepared(kv: Literal["stored", "replayed"] | None, targets: int) -> Callable[[], float]:
        def edit() -> float:
            settings = replace(module.editing, start=1.0 if kv is None else 0.0, kv=kv or "stored")
            data = SourceImages(run=str(out), targets=asked[:targets], overwrite=True)
            KVTrainer(accelerator="auto", logger=False, quiet=True).edit(module, data, settings)
            written = {str(path) for path in module.last_edits}
            record = next(record for record, file in RunStore(out).edits() if str(file) in written)
            return float(record["figures"]["seconds"])

        return edit

    return prepared


def kept_as(dtype: str, folder: Path, seed: int, settings: dict[str, Any]) -> tuple[int, float]:
    """Bytes of a picture's psi, K-bar and V-bar, and the reconstruction's PSNR to the VAE round trip."""
    image, source = picture(folder, seed)
    out = folder / f"{seed}-{dtype}"
    module = KVInversion(**{**settings, "store_dtype": dtype})
    KVTrainer(accelerator="auto", logger=False, quiet=True).fit(
        module, datamodule=SourceImages(str(image), source, out=str(out))
    )
    size = sum(file.stat().st_size for file in (out / "steps").glob("*.safetensors"))
    return size, RunStore(out).read_run()["reconstruction"]["psnr_to_round_trip"]


def two_processes(folder: Path, pictures: int, slots: int, steps: int) -> dict[str, Callable[[], float]]:
    """A folder of pictures tuned by two processes of one thread each; both ways give their seconds."""
    halves = [folder / "first", folder / "second"]
    for n in range(pictures):
        file, _ = picture(folder / "all", 900_000 + n)
        half = halves[n * 2 // pictures]
        half.mkdir(exist_ok=True)
        shutil.copy(file, half)

    def taken(sources: list[Path], devices: int) -> float:
        outs = [folder / "runs" / source.name for source in sources]
        commands = [
            [*_fit(source, out, slots, steps, devices), "--source", "an animal", "--trainer.quiet", "true"]
            for source, out in zip(sources, outs, strict=True)
        ]
        seconds, _ = _timed(commands)
        shutil.rmtree(folder / "runs")
        return seconds

    return {
        "two ranks": lambda: taken([folder / "all"], 2),
        "two single processes": lambda: taken(halves, 1),
    }


def one_picture(
    folder: Path, slots: int, inner_steps: int, steps: int
) -> dict[str, Callable[[], tuple[float, float]]]:
    """A picture tuned with the curriculum pivot: seconds of the command, and of its pass at the pivots."""
    image, source = picture(folder, 900_000)

    def taken(devices: int) -> tuple[float, float]:
        command = [
            *_fit(image, folder / "run", slots, steps, devices), "--source", source,
            "--model.curriculum", "pivot", "--model.inner_steps", str(inner_steps),
            "--model.tolerance", "0", "--model.tolerance_growth", "0",
        ]  # fmt: skip
        seconds, (said,) = _timed([command])
        shutil.rmtree(folder / "run")
        found = re.search(r"at the pivots .* steps in (?:(\d+):)?([\d.]+) (?:s|min)", said)
        if found is None:
            raise RuntimeError(f"kvinv fit said nothing of its pass at the pivots: {said}")
        return seconds, 60 * int(found[1] or 0) + float(found[2])

    return {"two devices": lambda: taken(2), "one": lambda: taken(1)}


def _fit(image: Path, out: Path, slots: int, steps: int, devices: int) -> list[str]:
    return [
        sys.executable, "-m", "kvinv_pl", "fit", "--image", str(image), "--out", str(out),
        "--steps", str(steps), "--model.slots", str(slots), "--model.retries", "0",
        "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.devices", str(devices),
    ]  # fmt: skip


def _timed(commands: list[list[str]]) -> tuple[float, list[str]]:
    """Seconds until these commands, run at once with one thread for each of their ranks, have ended.

    And what each of them has said.
    """
    began = time.perf_counter()
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    said = [process.communicate()[1] for process in started]
    seconds = time.perf_counter() - began
    for process, words in zip(started, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"kvinv fit ended with {process.returncode}: {words}")
    return seconds, said
