"""Stages 1 and 3 of one picture, from its run folder and back into it, and what a tuned picture is worth."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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


@torch.no_grad()
def invert_picture(network: Network, work: Work, guidance: float, negative: str, watch: Progress) -> None:
    """Stage 1 of one picture: source.png, trajectory.safetensors and run.json."""
    record, pixels, mask = inversion_record(network, work, guidance, negative)
    store, table = work.store, network.table
    z_0 = network.backbone.encode(pixels[None].to(network.device))
    contexts = network.backbone.embed([record["inversion"]["negative"], work.source])[:, None]
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


def masks_of(stores: list[RunStore]) -> Tensor | None:
    """The masks of pictures tuned side by side, (slots, h, w) in 0..1, or None if they have none."""
    found = []
    for store in stores:
        picture = store.read_run()["picture"]
        if picture["mask"]:
            mask = pictures.open_picture(store.folder / "mask.png").image
            geometry = records.geometry_of({**picture, "size": list(mask.size), "box": None})
            found.append(pictures.to_mask(mask, geometry))
    if found and len(found) < len(stores):
        raise UserError("some pictures tuned side by side have a mask and some have none: tune them apart")
    return torch.stack(found) if found else None


@torch.no_grad()
def certify(network: Network, store: RunStore) -> float:
    """Decode the reconstruction, write what it is worth, and return its PSNR in dB to the VAE round trip."""
    run, steps = store.read_run(), len(network.table)
    z = torch.stack([store.trajectory()[0], store.step(steps - 1).z]).to(network.device)
    round_trip, tuned = network.backbone.decode(z).cpu()
    picture = pictures.to_image(tuned, records.geometry_of(run["picture"]))
    source = pictures.open_picture(store.folder / "source.png").image
    infos = [store.step_info(i) for i in range(steps)]
    quality = round(records.psnr(tuned, round_trip), 2)
    figures = {
        "psnr_to_round_trip": quality,
        "psnr_to_source": round(records.psnr(pictures.as_pixels(picture), pictures.as_pixels(source)), 2),
        "inner_steps": sum(info["inner_steps"] for info in infos),
        "phases": infos,
    }
    store.save_picture("reconstruction", picture)
    store.write_run({**run, "reconstruction": figures})
    return quality


@torch.no_grad()
def edit_picture(
    network: Network, work: Work, guidance: float, reading: str, start: float, negative: str, watch: Progress
) -> list[Path]:
    """Stage 3 of one picture: a picture and a record for each target, and the sheet; their paths."""
    store, table, began = work.store, network.table, time.perf_counter()
    run = store.read_run()
    if not is_tuned(network, store) or "tuning" not in run:
        raise UserError(f"{store.folder} is not tuned to the end: go on with `kvinv fit` before editing")
    trajectory = store.trajectory()
    attachment = network.place((trajectory.shape[-2], trajectory.shape[-1]), slots=1)
    here = {"sites": list(attachment.psi), "attention": records.of_variant(network.cps[0])}
    store.require({"tuning": {**run["tuning"], **here}}, ["tuning"])
    network.bind(masks_of([store]))
    if guidance != run["tuning"]["guidance"]:
        watch.note(f"{work.name}: tuned at guidance {run['tuning']['guidance']:g}, edited at {guidance:g}")
    # rows of the U-Net: edit after edit, each unconditional, then conditional
    contexts = network.backbone.embed([text for target in work.targets for text in (negative, target)])
    watch.begin("editing", work.name, len(table))

    def eps(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with network.autocast():
            both = network.backbone.eps(z.repeat_interleave(2, 0), t.repeat_interleave(2), contexts)
        eps_u, eps_c = both.unflatten(0, (-1, 2)).unbind(1)
        return eps_u, eps_c

    with ThreadPoolExecutor(1) as pool:
        first = first_step(start, len(table))
        # one step of prefetch: the next psi_t is read while the network works
        coming = {first: pool.submit(store.step, first)} if first < len(table) else {}

        @contextmanager
        def psi(i: int) -> Iterator[None]:
            step = coming.pop(i).result()
            if i + 1 < len(table):
                coming[i + 1] = pool.submit(store.step, i + 1)
            if reading == "blend":
                network.read(step.psi, slot=0)
                with attachment.blend():
                    yield
            elif step.kv is None:
                raise UserError(f"{store.folder} holds no K-bar and V-bar: edit it with reading blend")
            else:
                with attachment.frozen({path: (k[:, None], v[:, None]) for path, (k, v) in step.kv.items()}):
                    yield

        z_T = trajectory[-1:].to(network.device).expand(len(work.targets), -1, -1, -1)
        z_0 = edit(
            eps, z_T, table, psi, guidance, start,
            lambda i: watch.advance(f"timestep {int(table.timesteps[i])}"),
        )  # fmt: skip
    geometry = records.geometry_of(run["picture"])
    edited = [pictures.to_image(pixels.cpu(), geometry) for pixels in network.backbone.decode(z_0)]
    seconds = round((time.perf_counter() - began) / len(edited), 2)
    paths = []
    for target, picture in zip(work.targets, edited, strict=True):
        record = {
            "target": target, "source": run["source"], "negative": negative, "guidance": guidance,
            "tuned_at": run["tuning"]["guidance"], "reading": reading, "start": start,
            "picture": run["picture"]["sha256"], "model": run["model"]["sha256"],
            "tuning": run["tuning"], "figures": {"seconds": seconds},
        }  # fmt: skip
        paths.append(store.save_edit(target, picture, record))
    store.save_picture("sheet", sheet_of(store))
    watch.finish()
    return paths


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
