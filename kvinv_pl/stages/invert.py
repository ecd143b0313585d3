"""Stage 1 of one picture, from its run folder and back into it."""

from typing import Any

import torch
from torch import Tensor

from kvinv_pl.algorithm.inversion import invert
from kvinv_pl.data.images.geometry import Geometry, to_image, to_mask
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.runs.records import TRAJECTORY_FIELDS, geometry_of, versions
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.data.source_image import LoadedImage, SourceImage
from kvinv_pl.models.checkpoints.finite import require_finite
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.stages.curriculum import first_missing
from kvinv_pl.stages.progress import Observers
from kvinv_pl.stages.settings import InversionSettings


def load_image(denoiser: Denoiser, image: SourceImage) -> LoadedImage:
    """The picture in this model's size."""
    return image.load(denoiser.backbone.sample_size, denoiser.backbone.multiple)


def inversion_record(denoiser: Denoiser, image: SourceImage, settings: InversionSettings) -> dict[str, Any]:
    """The fields of run.json for the inversion."""
    backbone, picture = denoiser.backbone, load_image(denoiser, image).record
    if lost := backbone.prompts.truncated(image.source):
        notes = [*picture["notes"], f"the end of the source prompt is not read: {lost}"]
        picture = {**picture, "notes": notes}
    return {
        "model": backbone.identity,
        "scheduler": denoiser.table.record(),
        "picture": picture,
        "source": image.source,
        "inversion": settings.record(),
        "versions": versions(),
    }


def is_inverted(denoiser: Denoiser, image: SourceImage, settings: InversionSettings) -> bool:
    """Whether the trajectory exists; a run with other settings is refused by the field that differs."""
    store = image.store
    if not store.has_run():
        return False
    if image.path is not None:
        expected, fields = inversion_record(denoiser, image, settings), TRAJECTORY_FIELDS
    else:
        expected = {"model": denoiser.backbone.identity, "scheduler": denoiser.table.record()}
        fields = ("model", "scheduler")
    model = store.read_run().get("model", {})
    if model.get("sha256") == expected["model"]["sha256"]:  # the same one, at whatever path
        expected["model"] = model
    store.require(expected, fields)
    return store.has_trajectory()


def is_tuned(denoiser: Denoiser, store: RunStore) -> bool:
    """Whether every step has its psi."""
    steps = len(denoiser.table)
    return store.has_trajectory() and first_missing(store.done(), steps) == steps


@torch.no_grad()
def invert_picture(
    denoiser: Denoiser, image: SourceImage, settings: InversionSettings, observers: Observers
) -> None:
    """Stage 1 of one picture: source.png, trajectory.safetensors and run.json."""
    record = inversion_record(denoiser, image, settings)
    store, table, picture = image.store, denoiser.table, load_image(denoiser, image)
    pixels, mask = picture.pixels, picture.mask
    z_0 = denoiser.backbone.encode(pixels[None].to(denoiser.device))
    contexts = denoiser.backbone.embed([record["inversion"]["negative"], image.source])[:, None]
    predict = denoiser.guided_prediction(contexts, settings.guidance)
    also = "" if settings.guidance == 1 else "use a lower inversion_guidance, or "

    def finite(z: Tensor, t: Tensor) -> Tensor:
        what = f"what the model makes of {image.name} at timestep {int(t[0])} of the inversion"
        return require_finite(predict(z, t), what, denoiser.backbone.unet.dtype, also)

    observers.progress.begin("inverting", image.name, len(table))
    z = invert(
        finite, z_0, table,
        lambda i: observers.progress.advance(f"timestep {int(table.timesteps[i])}"),
    )  # fmt: skip
    geometry = geometry_of(record["picture"])
    if mask is not None:
        shown = to_image(mask[None].expand(3, -1, -1) * 2 - 1, geometry)
        store.save_picture("mask", shown.convert("L"))
    store.save_picture("source", to_image(pixels, geometry))
    store.save_trajectory(z[:, 0].cpu())
    run = store.read_run() if store.has_run() else {}  # a lost trajectory is made again
    store.write_run({**run, **record})  # last: with it, the picture is inverted
    observers.progress.finish()


def mask_of(store: RunStore) -> Tensor | None:
    """The mask of a picture in the model's size, (h, w) in 0..1, or None if it has none."""
    if not store.read_run()["picture"]["mask"]:
        return None
    mask = open_picture(store.folder / "mask.png").image
    return to_mask(mask, Geometry(mask.size, store.geometry().resized))
