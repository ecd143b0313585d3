"""Stage 1 of one picture, from its run folder and back into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvinv_pl.algorithm.inversion import invert
from kvinv_pl.data.masks import fitted, open_mask
from kvinv_pl.data.pictures import fit_geometry, open_picture, to_image, to_mask, to_pixels
from kvinv_pl.data.records import INVERTED, geometry_of, of_picture, of_table, versions
from kvinv_pl.data.run_store import RunStore
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.errors import UserError
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.stages.curriculum import first_missing
from kvinv_pl.stages.progress import Progress


def inversion_record(
    denoiser: Denoiser, work: SourceImage, guidance: float, negative: str
) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """What run.json will say of the inversion, the pixels as the model takes them, and the mask."""
    if work.path is None:
        raise UserError(
            f"{work.store.folder} is not inverted, and which picture it is of was not said: give --image"
        )
    picture = open_picture(work.path)
    backbone = denoiser.backbone
    geometry = fit_geometry(picture.image.size, backbone.sample_size, backbone.multiple, work.geometry)
    mask = open_mask(work.mask) if work.mask else None
    record = {
        "model": backbone.identity,
        "scheduler": of_table(denoiser.table, backbone.predicts_v),
        "picture": of_picture(work.name, picture, geometry, work.geometry, mask.sha256 if mask else None),
        "source": work.source,
        "inversion": {"guidance": guidance, "negative": negative if guidance != 1 else ""},
        "versions": versions(),
    }
    if lost := backbone.unread(work.source):
        record["picture"]["notes"] = [*picture.notes, f"the end of the source prompt is not read: {lost}"]
    return (
        record,
        to_pixels(picture.image, geometry),
        fitted(mask.image, geometry, f"the mask {work.mask}") if mask else None,
    )


def is_inverted(denoiser: Denoiser, work: SourceImage, guidance: float, negative: str) -> bool:
    """Whether the trajectory is there; a run made otherwise is refused by the field that differs."""
    store = work.store
    if not store.has_run():
        return False
    if work.path is not None:
        expected, fields = inversion_record(denoiser, work, guidance, negative)[0], INVERTED
    else:
        table = of_table(denoiser.table, denoiser.backbone.predicts_v)
        expected = {"model": denoiser.backbone.identity, "scheduler": table}
        fields = ("model", "scheduler")
    there = store.read_run().get("model", {})
    if there.get("sha256") == expected["model"]["sha256"]:  # the same one, wherever it lies now
        expected["model"] = there
    store.require(expected, fields)
    return store.has_trajectory()


def is_tuned(denoiser: Denoiser, store: RunStore) -> bool:
    """Whether every step has its psi."""
    steps = len(denoiser.table)
    return store.has_trajectory() and first_missing(store.done(), steps) == steps


@torch.no_grad()
def invert_picture(
    denoiser: Denoiser, work: SourceImage, guidance: float, negative: str, watch: Progress
) -> None:
    """Stage 1 of one picture: source.png, trajectory.safetensors and run.json."""
    record, pixels, mask = inversion_record(denoiser, work, guidance, negative)
    store, table = work.store, denoiser.table
    z_0 = denoiser.backbone.encode(pixels[None].to(denoiser.device))
    contexts = denoiser.backbone.embed([record["inversion"]["negative"], work.source])[:, None]
    if not work.source:
        watch.note(f"{work.name}: the source prompt is empty; --source says what the picture shows")
    watch.begin("inverting", work.name, len(table))
    z = invert(
        denoiser.guided_eps(contexts, guidance), z_0, table,
        lambda i: watch.advance(f"timestep {int(table.timesteps[i])}"),
    )  # fmt: skip
    geometry = geometry_of(record["picture"])
    if mask is not None:
        shown = to_image(mask[None].expand(3, -1, -1) * 2 - 1, geometry)
        store.save_picture("mask", shown.convert("L"))
    store.save_picture("source", to_image(pixels, geometry))
    store.save_trajectory(z[:, 0].cpu())
    run = store.read_run() if store.has_run() else {}  # a trajectory that was lost is made again
    store.write_run({**run, **record})  # last: with it, the picture is inverted
    watch.finish()


def mask_of(store: RunStore) -> Tensor | None:
    """The mask of a picture as the model takes it, (h, w) in 0..1, or None if it has none."""
    picture = store.read_run()["picture"]
    if not picture["mask"]:
        return None
    mask = open_picture(store.folder / "mask.png").image
    geometry = geometry_of({**picture, "size": list(mask.size), "box": None})
    return to_mask(mask, geometry)
