"""Attempts at tuning a picture: their quality, and which of them is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from kvinv_pl.data.images.geometry import as_pixels, psnr, to_image
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.stages.curriculum import Pass, first_missing
from kvinv_pl.stages.settings import TuningSettings


@torch.no_grad()
def certify(denoiser: Denoiser, store: RunStore, attempt: Attempt) -> dict[str, Any]:
    """Decode the result of an attempt at tuning, and write its figures if it is the best so far.

    `store` is the run folder at that attempt. Returns run.json's field "reconstruction": the figures of the
    attempt that is kept, and of each attempt.
    """
    picture, figures = _measure(denoiser, store)
    run, number, required = store.read_run(), attempt.number, attempt.settings.required_psnr
    previous = run.get("reconstruction") if number else None
    attempts = [*(previous["attempts"][:number] if previous else [])]
    at_most, psnr_reached = attempt.inner_steps_at_most, figures["psnr_to_round_trip"]
    attempts.append({"inner_steps_at_most": at_most, "psnr_to_round_trip": psnr_reached})
    best = previous if previous and previous["psnr_to_round_trip"] >= psnr_reached else None
    record = {**(best or figures), "attempts": attempts, "kept": best["kept"] if best else number}
    record |= {"psnr_demanded": required, "passed": record["psnr_to_round_trip"] >= required}
    record["retries"] = attempt.settings.retries
    if not best:
        store.save_picture("reconstruction", picture)
    store.write_run({**run, "reconstruction": record})  # now the attempt counts
    (store.drop_attempts if best else store.settle)()
    return record


def next_attempt(store: RunStore, settings: TuningSettings) -> int | None:
    """The number of the next attempt; None if the picture has passed, or there are no more retries."""
    record = store.read_run()["reconstruction"]
    count = len(record["attempts"])
    passed = record["psnr_to_round_trip"] >= settings.required_psnr
    return None if passed or count > settings.retries else count


def _measure(denoiser: Denoiser, store: RunStore) -> tuple[Image.Image, dict[str, Any]]:
    geometry, steps = store.geometry(), len(denoiser.table)
    z = torch.stack([store.trajectory()[0], store.step(steps - 1).z]).to(denoiser.device)
    round_trip, tuned = denoiser.backbone.decode(z).cpu()
    picture, ceiling = (to_image(pixels, geometry) for pixels in (tuned, round_trip))
    source = as_pixels(open_picture(store.folder / "source.png").image)
    infos = [store.step_info(i) for i in range(steps)]
    return picture, {
        "psnr_to_round_trip": round(psnr(tuned, round_trip), 2),
        "psnr_to_source": round(psnr(as_pixels(picture), source), 2),
        "psnr_of_round_trip_to_source": round(psnr(as_pixels(ceiling), source), 2),
        "inner_steps": sum(info["inner_steps"] + info.get("inner_steps_at_pivot", 0) for info in infos),
        "phases": infos,
    }


@dataclass(frozen=True)
class Attempt:
    """The first attempt (0) is in the run folder itself; each later one has twice the inner steps."""

    number: int
    settings: TuningSettings

    def inner_steps(self, which: Pass) -> int:
        """Optimiser steps for one timestep at most, in this pass of the curriculum."""
        return self.settings.steps_at_most(which) * 2**self.number

    @property
    def seed(self) -> int:
        """Of random starts, which are others in every attempt."""
        return self.settings.seed + self.number

    def at(self, image: SourceImage) -> SourceImage:
        """The picture, with the phases of this attempt."""
        return replace(image, store=image.store.at_attempt(self.number))

    def open(
        self, image: SourceImage, steps: int, tuning: Mapping[str, Any], editing: Mapping[str, Any]
    ) -> set[int] | None:
        """Which phases of a picture at this attempt are done; None: nothing is left to do.

        Raises UserError if they were made with other settings; if phases are missing, writes the settings to
        run.json.
        """
        store, finished = image.store, image.store.done()
        if not self.number:
            run = store.read_run()
            if "tuning" in run and store.has_begun():
                store.require({"tuning": tuning}, ["tuning"])
            if first_missing(finished, steps) < steps:
                store.drop_attempts()
                run.pop("reconstruction", None)
                store.write_run({**run, "tuning": tuning, "editing": editing})
        return finished if self.is_due(image) else None

    def is_due(self, image: SourceImage) -> bool:
        """Whether the attempt is still to be made or certified."""
        if self.number:
            return next_attempt(image.store, self.settings) == self.number
        return "reconstruction" not in image.store.read_run()

    @property
    def inner_steps_at_most(self) -> int:
        """Optimiser steps for one timestep at most, before z-tilde rolls out for good."""
        return self.settings.inner_steps * 2**self.number

    def log_name(self, image: SourceImage) -> str:
        """The name of a picture in the logs; later attempts have curves of their own."""
        return image.store.folder.name + (f"-attempt-{self.number + 1}" if self.number else "")
