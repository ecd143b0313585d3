"""One attempt at tuning a picture, what it is worth, and which of several attempts is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from kvinv_pl.data.pictures import as_pixels, open_picture, psnr, to_image
from kvinv_pl.data.records import geometry_of
from kvinv_pl.data.run_store import RunStore
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.errors import UserError
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.stages.curriculum import Pass, first_missing
from kvinv_pl.stages.settings import TuningSettings


@dataclass(frozen=True)
class Demand:
    """The PSNR in dB to the VAE round trip that a reconstruction must reach, and how often to try again."""

    psnr: float
    retries: int

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if math.isnan(self.psnr) or self.retries < 0:
            raise UserError(
                "required_psnr and retries: expected dB and a number of 0 or more, got "
                f"{self.psnr} and {self.retries}"
            )


@torch.no_grad()
def certify(
    denoiser: Denoiser, store: RunStore, demand: Demand, attempt: int = 0, inner_steps: int = 0
) -> dict[str, Any]:
    """Decode what an attempt at tuning came to, and write its figures where it is the best one so far.

    Args:
        denoiser: the model, on its device.
        store: the run folder, at that attempt.
        demand: what makes the picture pass.
        attempt: 0 for the first one, whose phases lie in the run folder itself.
        inner_steps: optimiser steps for one timestep at most, in this attempt.

    Returns:
        run.json's field "reconstruction": the figures of the attempt that is kept, and a line for each made.
    """
    picture, figures = _measure(denoiser, store)
    run = store.read_run()
    before = run.get("reconstruction") if attempt else None
    made = [*(before["attempts"][:attempt] if before else [])]
    made.append({"inner_steps_at_most": inner_steps, "psnr_to_round_trip": figures["psnr_to_round_trip"]})
    best = before if before and before["psnr_to_round_trip"] >= figures["psnr_to_round_trip"] else None
    record = {**(best or figures), "attempts": made, "kept": best["kept"] if best else attempt}
    record |= {"psnr_demanded": demand.psnr, "passed": record["psnr_to_round_trip"] >= demand.psnr}
    if best:
        store.write_run({**run, "reconstruction": record})
        store.drop_attempts()
        return record
    store.save_picture("reconstruction", picture)
    store.write_run({**run, "reconstruction": record})  # from here on the attempt counts
    store.settle()
    return record


def is_certified(store: RunStore) -> bool:
    """Whether the figures of a tuned picture are there."""
    return "reconstruction" in store.read_run()


def next_attempt(store: RunStore, demand: Demand) -> int | None:
    """The number of the attempt that is due: none where the picture has passed, or all have been made."""
    record = store.read_run()["reconstruction"]
    made = len(record["attempts"])
    reached = record["psnr_to_round_trip"] >= demand.psnr
    return None if reached or made > demand.retries else made


def _measure(denoiser: Denoiser, store: RunStore) -> tuple[Image.Image, dict[str, Any]]:
    """The reconstruction as a picture, and its figures."""
    run, steps = store.read_run(), len(denoiser.table)
    z = torch.stack([store.trajectory()[0], store.step(steps - 1).z]).to(denoiser.device)
    round_trip, tuned = denoiser.backbone.decode(z).cpu()
    geometry = geometry_of(run["picture"])
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
    """The first attempt (0) lies in the run folder itself; each later one has twice the inner steps."""

    number: int
    recipe: TuningSettings
    demand: Demand

    def inner_steps(self, which: Pass) -> int:
        """Optimiser steps for one timestep at most, in this pass of the curriculum."""
        return self.recipe.steps_at_most(which) * 2**self.number

    @property
    def seed(self) -> int:
        """Of random starts, which are others in every attempt."""
        return self.recipe.seed + self.number

    def at(self, work: SourceImage) -> SourceImage:
        """The picture, with the phases of this attempt."""
        return replace(work, store=work.store.at_attempt(self.number))

    def take_up(
        self, work: SourceImage, steps: int, tuning: Mapping[str, Any], editing: Mapping[str, Any]
    ) -> set[int] | None:
        """Which phases of a picture at this attempt are done; None: there is nothing left to do.

        Raises UserError where they were made otherwise; if phases are missing, run.json then says how they
        are made.

        Args:
            work: The picture, with the phases of this attempt.
            steps: T.
            tuning: What psi depends on.
            editing: What an edit takes where nothing else is said.
        """
        store, finished = work.store, work.store.done()
        if not self.number:
            run = store.read_run()
            if "tuning" in run and store.has_begun():
                store.require({"tuning": tuning}, ["tuning"])
            if first_missing(finished, steps) < steps:
                store.drop_attempts()
                run.pop("reconstruction", None)
                store.write_run({**run, "tuning": tuning, "editing": editing})
        return finished if self.is_due(work) else None

    def is_due(self, work: SourceImage) -> bool:
        """Whether it is still to be made, or to be certified."""
        if self.number:
            return next_attempt(work.store, self.demand) == self.number
        return not is_certified(work.store)

    @property
    def inner_steps_at_most(self) -> int:
        """Optimiser steps for one timestep at most, before z-tilde rolls out for good."""
        return self.recipe.inner_steps * 2**self.number

    def certify(self, denoiser: Denoiser, work: SourceImage) -> dict[str, Any]:
        """Write the certificate of a picture that is tuned; run.json's field "reconstruction"."""
        return certify(denoiser, work.store, self.demand, self.number, self.inner_steps_at_most)

    def logged_as(self, work: SourceImage) -> str:
        """The name of a picture in the logs; later attempts have curves of their own."""
        return work.store.folder.name + (f"-attempt-{self.number + 1}" if self.number else "")
