"""Stages 1 and 3 of one picture, from its run folder and back into it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kvinv_pl import masks, pictures, records
from kvinv_pl.curriculum import first_missing
from kvinv_pl.editing import edit, first_step
from kvinv_pl.errors import UserError
from kvinv_pl.inversion import invert
from kvinv_pl.network import Network
from kvinv_pl.progress import Progress
from kvinv_pl.reading import Reader, subject_positions
from kvinv_pl.sheet import sheet
from kvinv_pl.store import RunStore
from kvinv_pl.work import Work


def inversion_record(
    network: Network, work: Work, guidance: float, negative: str
) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """What run.json will say of the inversion, the pixels as the model takes them, and the mask."""
    if work.image is None:
        raise UserError(
            f"{work.store.folder} is not inverted, and which picture it is of was not said: give --image"
        )
    picture = pictures.open_picture(work.image)
    backbone = network.backbone
    geometry = pictures.fit_geometry(
        picture.image.size, backbone.sample_size, backbone.multiple, work.geometry
    )
    mask = masks.open_mask(work.mask) if work.mask else None
    record = {
        "model": backbone.identity,
        "scheduler": records.of_table(network.table, backbone.predicts_v),
        "picture": records.of_picture(
            work.name, picture, geometry, work.geometry, mask.sha256 if mask else None
        ),
        "source": work.source,
        "inversion": {"guidance": guidance, "negative": negative if guidance != 1 else ""},
        "versions": records.versions(),
    }
    if lost := backbone.unread(work.source):
        record["picture"]["notes"] = [*picture.notes, f"the end of the source prompt is not read: {lost}"]
    return (
        record,
        pictures.to_pixels(picture.image, geometry),
        masks.fitted(mask.image, geometry, f"the mask {work.mask}") if mask else None,
    )


def is_inverted(network: Network, work: Work, guidance: float, negative: str) -> bool:
    """Whether the trajectory is there; a run made otherwise is refused by the field that differs."""
    store = work.store
    if not store.has_run():
        return False
    if work.image is not None:
        expected, fields = inversion_record(network, work, guidance, negative)[0], records.INVERTED
    else:
        table = records.of_table(network.table, network.backbone.predicts_v)
        expected = {"model": network.backbone.identity, "scheduler": table}
        fields = ("model", "scheduler")
    there = store.read_run().get("model", {})
    if there.get("sha256") == expected["model"]["sha256"]:  # the same one, wherever it lies now
        expected["model"] = there
    store.require(expected, fields)
    return store.has_trajectory()


def is_tuned(network: Network, store: RunStore) -> bool:
    """Whether every step has its psi."""
    steps = len(network.table)
    return store.has_trajectory() and first_missing(store.done(), steps) == steps


def refuse_unreadable(network: Network, work: Work, reading: str, subject: str | None, masked: bool) -> None:
    """Refuse, rather than after the tuning, what an edit could not read with the variant that is attached.

    Args:
        network: The model, with psi attached.
        work: The picture with its targets.
        reading: frozen or blend.
        subject: The word for the subject, if one was given.
        masked: Whether the picture has a mask.
    """
    if why := network.why_not(reading):
        other = {"frozen": "blend", "blend": "frozen"}[reading]
        raise UserError(f"reading: expected {other}, got {reading}: {why}")
    variant = network.cps[0]
    if variant.wants_mask and not masked:
        raise UserError(
            f"{type(variant).__name__} needs a mask of the subject: give --mask (`kvinv mask` makes one)"
        )
    if subject and not variant.follows:
        raise UserError(
            f"subject: got {subject!r}, but {type(variant).__name__} does not follow it: leave it out"
        )
    if variant.follows:
        subject_positions(network.backbone, work.source, work.targets, subject)


@torch.no_grad()
def invert_picture(network: Network, work: Work, guidance: float, negative: str, watch: Progress) -> None:
    """Stage 1 of one picture: source.png, trajectory.safetensors and run.json."""
    record, pixels, mask = inversion_record(network, work, guidance, negative)
    store, table = work.store, network.table
    z_0 = network.backbone.encode(pixels[None].to(network.device))
    contexts = network.backbone.embed([record["inversion"]["negative"], work.source])[:, None]
    if not work.source:
        watch.note(f"{work.name}: the source prompt is empty; --source says what the picture shows")
    watch.begin("inverting", work.name, len(table))
    z = invert(
        network.guided_eps(contexts, guidance), z_0, table,
        lambda i: watch.advance(f"timestep {int(table.timesteps[i])}"),
    )  # fmt: skip
    geometry = records.geometry_of(record["picture"])
    if mask is not None:
        shown = pictures.to_image(mask[None].expand(3, -1, -1) * 2 - 1, geometry)
        store.save_picture("mask", shown.convert("L"))
    store.save_picture("source", pictures.to_image(pixels, geometry))
    store.save_trajectory(z[:, 0].cpu())
    run = store.read_run() if store.has_run() else {}  # a trajectory that was lost is made again
    store.write_run({**run, **record})  # last: with it, the picture is inverted
    watch.finish()


def mask_of(store: RunStore) -> Tensor | None:
    """The mask of a picture as the model takes it, (h, w) in 0..1, or None if it has none."""
    picture = store.read_run()["picture"]
    if not picture["mask"]:
        return None
    mask = pictures.open_picture(store.folder / "mask.png").image
    geometry = records.geometry_of({**picture, "size": list(mask.size), "box": None})
    return pictures.to_mask(mask, geometry)


@torch.no_grad()
def edit_picture(
    network: Network,
    work: Work,
    guidance: float,
    reading: str,
    kv: str,
    start: float,
    negative: str,
    subject: str | None,
    watch: Progress,
    again: bool = False,
) -> list[Path]:
    """Stage 3 of one picture: a picture and a record for each target, and the sheet; their paths.

    What was rendered with the very same settings is not rendered again, unless `again`.
    """
    store, table, began = work.store, network.table, time.perf_counter()
    run = store.read_run()
    if not is_tuned(network, store) or not {"tuning", "reconstruction"} <= run.keys():
        raise UserError(f"{store.folder} is not tuned to the end: go on with `kvinv fit` before editing")
    trajectory = store.trajectory()
    attachment = network.place((trajectory.shape[-2], trajectory.shape[-1]), slots=1)
    here = {"sites": list(attachment.psi), "attention": records.of_variant(network.cps[0])}
    store.require({"tuning": {**run["tuning"], **here}}, ["tuning"])
    if reading == "frozen" and kv == "stored" and run["tuning"]["kv"] == "replayed":
        raise UserError(
            f"{store.folder} holds psi alone, without K-bar and V-bar: edit it with kv replayed, "
            "or reading blend"
        )
    mask = mask_of(store)
    network.bind(None if mask is None else mask[None])
    asked = {
        target: {
            "target": target, "source": run["source"], "negative": negative, "guidance": guidance,
            "tuned_at": run["tuning"]["guidance"], "reading": reading, "start": start,
            **({"kv": kv} if reading == "frozen" else {}),
            **({"subject": subject} if subject else {}),
            "picture": run["picture"]["sha256"], "model": run["model"]["sha256"],
            "precision": str(network.backbone.unet.dtype).removeprefix("torch."),
            "tuning": run["tuning"], "attempt": run["reconstruction"]["kept"],
        }
        for target in work.targets
    }  # fmt: skip
    there = {} if again else {target: store.edit_like(target, record) for target, record in asked.items()}
    paths = {target: path for target, path in there.items() if path is not None}
    for path in paths.values():
        watch.note(f"{work.name}: {path} is there with these settings; --overwrite renders it again")
    targets = [target for target in asked if target not in paths]
    if not targets:
        store.save_picture("sheet", sheet_of(store))  # a kill may have left an older one
        return list(paths.values())
    if guidance != run["tuning"]["guidance"]:
        watch.note(f"{work.name}: tuned at guidance {run['tuning']['guidance']:g}, edited at {guidance:g}")
    reader = Reader(network, store, targets, negative, reading, kv, first_step(start, len(table)), subject)
    watch.begin("editing", work.name, len(table))
    z_T = trajectory[-1:].to(network.device).expand(len(targets), -1, -1, -1)
    with reader.reading_ahead():
        z_0 = edit(
            reader.eps, z_T, table, reader.psi, guidance, start,
            lambda i: watch.advance(f"timestep {int(table.timesteps[i])}"),
        )  # fmt: skip
    geometry = records.geometry_of(run["picture"])
    edited = [pictures.to_image(pixels.cpu(), geometry) for pixels in network.backbone.decode(z_0)]
    seconds = round((time.perf_counter() - began) / len(edited), 2)
    for target, picture in zip(targets, edited, strict=True):
        paths[target] = store.save_edit(target, picture, {**asked[target], "figures": {"seconds": seconds}})
    store.save_picture("sheet", sheet_of(store))
    watch.finish()
    for target in targets:
        _tell_apart(store, asked[target], paths[target], work.name, watch)
    return [paths[target] for target in asked]


def _tell_apart(store: RunStore, record: dict[str, Any], path: Path, name: str, watch: Progress) -> None:
    """Say what sets an edit apart from the one most like it whose target, and so name, is the same."""
    there = [(other, file) for other, file in store.edits() if other["target"] == record["target"]]
    unlike = [(records.told_apart(record, other), file) for other, file in there if file != path]
    if unlike:
        settings, file = min(unlike, key=lambda found: len(found[0]))
        mine, its = (", ".join(texts) for texts in zip(*settings, strict=True))
        watch.note(f"{name}: {path} has {mine}; {file.name}, of the same target, has {its}")


def sheet_of(store: RunStore) -> Image.Image:
    """The source, the reconstruction and every edit that lies in the run folder."""
    run, done = store.read_run(), store.edits()
    files = [store.folder / "source.png", store.folder / "reconstruction.png", *[file for _, file in done]]
    quality = run["reconstruction"]["psnr_to_round_trip"]
    captions = [f"source\n{run['source']}", f"reconstruction\n{quality:.1f} dB to the VAE round trip"]
    for record, _ in done:
        how = f"{record['reading']}, start {record['start']:g}, guidance {record['guidance']:g}"
        captions.append(f"{record['target']}\n{how}")
    return sheet([pictures.open_picture(file).image for file in files], captions)
