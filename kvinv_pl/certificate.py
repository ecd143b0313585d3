"""What a tuned picture is worth, whether that suffices, and which of several attempts at it is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from kvinv_pl import pictures, records
from kvinv_pl.errors import UserError
from kvinv_pl.network import Network
from kvinv_pl.store import RunStore


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
    network: Network, store: RunStore, demand: Demand, attempt: int = 0, inner_steps: int = 0
) -> dict[str, Any]:
    """Decode what an attempt at tuning came to, and write its figures where it is the best one so far.

    Args:
        network: the model, on its device.
        store: the run folder, at that attempt.
        demand: what makes the picture pass.
        attempt: 0 for the first one, whose phases lie in the run folder itself.
        inner_steps: optimiser steps for one timestep at most, in this attempt.

    Returns:
        run.json's field "reconstruction": the figures of the attempt that is kept, and a line for each made.
    """
    picture, figures = _measure(network, store)
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


def _measure(network: Network, store: RunStore) -> tuple[Image.Image, dict[str, Any]]:
    """The reconstruction as a picture, and its figures."""
    run, steps = store.read_run(), len(network.table)
    z = torch.stack([store.trajectory()[0], store.step(steps - 1).z]).to(network.device)
    round_trip, tuned = network.backbone.decode(z).cpu()
    geometry = records.geometry_of(run["picture"])
    picture, ceiling = (pictures.to_image(pixels, geometry) for pixels in (tuned, round_trip))
    source = pictures.as_pixels(pictures.open_picture(store.folder / "source.png").image)
    infos = [store.step_info(i) for i in range(steps)]
    return picture, {
        "psnr_to_round_trip": round(records.psnr(tuned, round_trip), 2),
        "psnr_to_source": round(records.psnr(pictures.as_pixels(picture), source), 2),
        "psnr_of_round_trip_to_source": round(records.psnr(pictures.as_pixels(ceiling), source), 2),
        "inner_steps": sum(info["inner_steps"] + info.get("inner_steps_at_pivot", 0) for info in infos),
        "phases": infos,
    }
