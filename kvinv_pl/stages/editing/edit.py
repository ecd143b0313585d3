"""Stage 3 of one picture, from its run folder and back into it: edits, and the sheet of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kvinv_pl.algorithm.editing import edit
from kvinv_pl.attention.config import variant_config
from kvinv_pl.data.failures import is_out_of_memory
from kvinv_pl.data.images.geometry import to_image
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.images.sheet import sheet
from kvinv_pl.data.runs.edits import CHOSEN, Edits, search_of
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.errors import UserError
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.models.input_warnings import refuse_same_prompts
from kvinv_pl.models.prompts import subject_positions, word_positions
from kvinv_pl.stages.editing.reader import Reader
from kvinv_pl.stages.invert import is_tuned, mask_of
from kvinv_pl.stages.progress import Observers
from kvinv_pl.stages.settings import IDLE, EditSettings


def check_edits(denoiser: Denoiser, image: SourceImage, settings: EditSettings) -> None:
    """Refuse, before tuning starts, edits that do not work with the model or the attached variant."""
    reading, subject = settings.reading, settings.subject
    refuse_same_prompts(denoiser.backbone, image.source, image.targets)
    if why := denoiser.why_not(reading):
        other = {"frozen": "blend", "blend": "frozen"}[reading]
        raise UserError(f"reading: expected {other}, got {reading}: {why}")
    variant = denoiser.cps[0]
    if variant.wants_mask and image.mask is None:
        raise UserError(
            f"{type(variant).__name__} needs a mask of the subject: give --mask (`kvinv mask` makes one), "
            "mask= in Python, or mask_given=True in a row of a bench"
        )
    follows = variant.follows or settings.background == "kept"
    if subject and not follows:
        raise UserError(
            f"subject: got {subject!r}, but {type(variant).__name__} does not use a subject: leave it out"
        )
    if follows:
        subject_positions(denoiser.backbone, image.source, image.targets, subject)
    if settings.background == "kept" and subject and image.mask is None:
        word_positions(denoiser.backbone, image.source, subject)  # without a mask, it is found by the word


@dataclass(frozen=True)
class EditedPicture:
    """The edits of one picture with the same settings."""

    paths: list[Path]
    """Of all targets, in their order."""
    existing: list[Path]
    """Those of them that existed and were not rendered again."""


def edit_picture(
    denoiser: Denoiser,
    image: SourceImage,
    settings: EditSettings,
    observers: Observers,
    overwrite: bool = False,
    quiet: bool = False,
) -> EditedPicture:
    """Stage 3 of one picture: a picture and a record for each target, and the sheet.

    An edit that exists with the same settings is not rendered again, unless `overwrite`; the user is told,
    unless `quiet`.
    """
    store, edits = image.store, Edits(image.store.folder)
    run = _tuned_run(denoiser, store, settings)
    records = _records(denoiser, image, settings, run)
    existing = {} if overwrite else {target: edits.find(target, record) for target, record in records.items()}
    paths = {target: path for target, path in existing.items() if path is not None}
    reused = list(paths.values())
    if not quiet:
        note_existing(image, reused, observers)
    if targets := [target for target in records if target not in paths]:
        if (edited_at := settings.guide.source_scale) != (tuned_at := run["tuning"]["guidance"]):
            observers.progress.note(f"{image.name}: tuned at guidance {tuned_at:g}, edited at {edited_at:g}")
        for target, (picture, rendering) in _render(denoiser, image, settings, targets, observers).items():
            paths[target] = edits.save(target, picture, {**records[target], **rendering})
    # where nothing was rendered, too: after a kill it may be outdated
    store.save_picture("sheet", run_sheet(store))
    if lost := [target for target in targets if target not in paths]:
        advice = "use a lower guidance scale, or precision 32-true"
        raise UserError(f"the edit to {' and '.join(map(repr, lost))} is not finite: {advice}")
    return EditedPicture([paths[target] for target in image.targets], reused)


def _tuned_run(denoiser: Denoiser, store: RunStore, settings: EditSettings) -> dict[str, Any]:
    """Attach what the run folder was tuned with, and give its run.json; refuse what cannot be edited so."""
    run = store.read_run()
    if not is_tuned(denoiser, store) or not {"tuning", "reconstruction"} <= run.keys():
        raise UserError(f"{store.folder} is not tuned to the end: resume it with `kvinv fit` before editing")
    trajectory = store.trajectory()
    attachment = denoiser.place((trajectory.shape[-2], trajectory.shape[-1]), slots=1)
    attached = {"sites": list(attachment.psi), "attention": variant_config(denoiser.cps[0])}
    store.require({"tuning": {**run["tuning"], **attached}}, ["tuning"])
    if settings.reading == "frozen" and settings.kv == "stored" and run["tuning"]["kv"] == "replayed":
        raise UserError(
            f"{store.folder} has psi only, without K-bar and V-bar: edit it with kv replayed, "
            "or reading blend"
        )
    mask = mask_of(store)
    denoiser.bind(None if mask is None else mask[None])
    return run


def _records(
    denoiser: Denoiser, image: SourceImage, settings: EditSettings, run: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Of every target all that its edit depends on."""
    precision = str(denoiser.backbone.unet.dtype).removeprefix("torch.")
    return {
        target: {
            "target": target, "source": run["source"],
            **settings.record(), "tuned_at": run["tuning"]["guidance"],
            "picture": run["picture"]["sha256"], "model": run["model"]["sha256"],
            "precision": precision,
            "tuning": run["tuning"], "attempt": run["reconstruction"]["kept"],
        }
        for target in image.targets
    }  # fmt: skip


@torch.no_grad()
def _render(
    denoiser: Denoiser, image: SourceImage, settings: EditSettings, targets: list[str], observers: Observers
) -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    """The edits to these targets that are finite, each with what its rendering adds to its record."""
    store, table, began = image.store, denoiser.table, time.perf_counter()
    trajectory, changed = store.trajectory(), list[int]()

    def sampled(batch: list[str]) -> Float[Tensor, "edits c h w"]:
        reader = Reader(denoiser, store, batch, settings)

        def after(i: int, z: Tensor) -> Tensor:
            z = reader.restore_background(i, z)
            other = observers.after_step(i, int(table.timesteps[i]), z) if observers.after_step else None
            if other is not None and other is not z:
                changed.append(i)
                z = other.to(z)
            observers.progress.advance(f"timestep {int(table.timesteps[i])}")
            return z

        observers.progress.begin("editing", image.name, len(table))
        z_T = trajectory[-1:].to(denoiser.device).expand(len(batch), -1, -1, -1)
        with reader.prefetching():
            return edit(
                reader.eps, z_T, table, reader.psi, settings.guide, settings.start, after, reader.eps_alone
            )

    z_0 = in_batches(targets, sampled)
    observers.progress.finish()
    finite = z_0.isfinite().flatten(1).all(1).tolist()
    geometry = store.geometry()
    decoded = denoiser.backbone.decode(z_0[finite]) if any(finite) else []
    rendering: dict[str, Any] = {
        "figures": {"seconds": round((time.perf_counter() - began) / len(targets), 2)},
        # what a callback has changed, the same settings alone would not give
        **({"steps_changed_by_a_callback": changed} if changed else {}),
    }
    rendered = [target for target, is_finite in zip(targets, finite, strict=True) if is_finite]
    return {
        target: (to_image(pixels.cpu(), geometry), rendering)
        for target, pixels in zip(rendered, decoded, strict=True)
    }


def note_existing(image: SourceImage, paths: list[Path], observers: Observers) -> None:
    """Tell the user, in one line, which edits are not rendered again."""
    if paths:
        first, *more = paths
        which = f"{first} and {len(more)} more exist" if more else f"{first} exists"
        observers.progress.note(f"{image.name}: {which} with these settings; --overwrite renders again")


def in_batches(
    targets: list[str], sampled: Callable[[list[str]], Float[Tensor, "edits c h w"]]
) -> Float[Tensor, "edits c h w"]:
    """What comes of these targets, all at once, or in halves and their halves where memory does not do."""
    try:
        return sampled(targets)
    except (RuntimeError, MemoryError) as error:
        if len(targets) == 1 or not is_out_of_memory(error):
            raise
    # behind the handler, which holds on to what the forward had made
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = (len(targets) + 1) // 2
    return torch.cat([in_batches(batch, sampled) for batch in (targets[:half], targets[half:])])


def run_sheet(store: RunStore) -> Image.Image:
    """The source, the reconstruction and every edit of the run folder on one sheet; the chosen are marked."""
    run, edits = store.read_run(), store.edits()
    files = [store.folder / "source.png", store.folder / "reconstruction.png", *[file for _, file in edits]]
    quality = run["reconstruction"]["psnr_to_round_trip"]
    captions = [f"source\n{run['source']}", f"reconstruction\n{quality:.1f} dB to the VAE round trip"]
    marked = list[int]()
    for record, _ in edits:
        details = f"{record['reading']}, start {record['start']:g}, guidance {record['guidance']:g}"
        for name in (name for name in IDLE if name in record):
            value = record[name]
            details += f", {name.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}"
        if search := search_of(record):
            details += f"\nagreement {search['agreement']:.3g}, likeness {search['likeness']:.3g}"
        if search.get("chosen"):
            marked.append(len(captions))
        mark = f"{CHOSEN}\n" if search.get("chosen") else ""
        captions.append(f"{mark}{record['target']}\n{details}")
    return sheet([open_picture(file).image for file in files], captions, marked=marked)
