"""Stage 3 of one picture, from its run folder and back into it: edits, and the sheet of them."""

import time
from collections.abc import Callable
from pathlib import Path

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
            f"{type(variant).__name__} needs a mask of the subject: give --mask (`kvinv mask` makes one)"
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


@torch.no_grad()
def edit_picture(
    denoiser: Denoiser,
    image: SourceImage,
    settings: EditSettings,
    observers: Observers,
    overwrite: bool = False,
    existing_paths: list[Path] | None = None,
) -> list[Path]:
    """Stage 3 of one picture: a picture and a record for each target, and the sheet; their paths.

    An edit that exists with the same settings is not rendered again, unless `overwrite`; the user is told, or
    its path is added to `existing_paths`.
    """
    store, table, began = image.store, denoiser.table, time.perf_counter()
    edits = Edits(store.folder)
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
    records = {
        target: {
            "target": target, "source": run["source"],
            **settings.record(), "tuned_at": run["tuning"]["guidance"],
            "picture": run["picture"]["sha256"], "model": run["model"]["sha256"],
            "precision": str(denoiser.backbone.unet.dtype).removeprefix("torch."),
            "tuning": run["tuning"], "attempt": run["reconstruction"]["kept"],
        }
        for target in image.targets
    }  # fmt: skip
    existing = {} if overwrite else {target: edits.find(target, record) for target, record in records.items()}
    paths = {target: path for target, path in existing.items() if path is not None}
    if existing_paths is None:
        note_existing(image, list(paths.values()), observers)
    else:
        existing_paths += paths.values()
    targets = [target for target in records if target not in paths]
    if not targets:
        store.save_picture("sheet", run_sheet(store))  # after a kill it may be outdated
        return [paths[target] for target in image.targets]
    if settings.guide.source_scale != (tuned_at := run["tuning"]["guidance"]):
        edited_at = settings.guide.source_scale
        observers.progress.note(f"{image.name}: tuned at guidance {tuned_at:g}, edited at {edited_at:g}")
    changed = list[int]()

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
    finite = z_0.isfinite().flatten(1).all(1).tolist()
    geometry = store.geometry()
    decoded = denoiser.backbone.decode(z_0[finite]) if any(finite) else []
    edited = [to_image(pixels.cpu(), geometry) for pixels in decoded]
    # what a callback has changed, the same settings alone would not give
    changed_steps = {"steps_changed_by_a_callback": changed} if changed else {}
    seconds = round((time.perf_counter() - began) / len(targets), 2)
    rendered = [target for target, is_finite in zip(targets, finite, strict=True) if is_finite]
    for target, picture in zip(rendered, edited, strict=True):
        paths[target] = edits.save(
            target, picture, {**records[target], **changed_steps, "figures": {"seconds": seconds}}
        )
    store.save_picture("sheet", run_sheet(store))
    observers.progress.finish()
    if lost := [target for target in targets if target not in rendered]:
        advice = "use a lower guidance scale, or precision 32-true"
        raise UserError(f"the edit to {' and '.join(map(repr, lost))} is not finite: {advice}")
    return [paths[target] for target in image.targets]


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
