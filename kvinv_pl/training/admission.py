"""Which pictures a command may begin with, and how many of them go side by side."""

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from kvinv_pl.data.source_image import SourceImage, Stage
from kvinv_pl.errors import UserError
from kvinv_pl.models.costs.memory import side_by_side
from kvinv_pl.optimizers import needs_closure, reads_residuals
from kvinv_pl.stages.editing.edit import check_edits
from kvinv_pl.stages.invert import is_inverted, is_tuned, load_image
from kvinv_pl.stages.progress import Progress
from kvinv_pl.stages.settings import EditSettings
from kvinv_pl.training.module import KVInversion


def check_image(
    model: KVInversion, image: SourceImage, stage: Stage, editing: EditSettings, replace_run: bool = False
) -> tuple[int, int, bool]:
    """Refuse invalid pictures, and run folders of other runs, before anything is written.

    `replace_run` says that the content of its folder will be replaced. Returns what pictures side by side
    have in common: the latents' height and width, and a mask or none.
    """
    denoiser, store, fresh = model.denoiser, image.store, replace_run or not image.store.has_run()
    for prompt in (image.source, *image.targets, model.inverting.negative, editing.negative):
        denoiser.backbone.prompts.text(prompt)  # which refuses what is not in its syntax
    ready = not fresh and is_inverted(denoiser, image, model.inverting) and is_tuned(denoiser, store)
    if stage == "edit" and not ready:
        raise UserError(f"{store.folder} is not tuned to the end: resume it with `kvinv fit` before editing")
    picture = load_image(denoiser, image).record if fresh else store.read_run()["picture"]
    (width, height), masked = picture["model_size"], picture["mask"] is not None
    factor = denoiser.backbone.vae_factor
    grid = (height // factor, width // factor)
    slots = 1 if stage == "edit" or model.slots == "auto" else int(model.slots)
    if stage != "invert":
        denoiser.place(grid, slots)
        check_edits(denoiser, image, editing)
    if stage == "fit":
        denoiser.bind(torch.ones(slots, height, width) if masked else None)
        record = model.tuning_record()
        if not fresh and "tuning" in store.read_run() and store.has_begun():
            store.require({"tuning": record}, ["tuning"])
    return (*grid, masked)


def choose_slots(
    model: KVInversion, grid: tuple[int, int], pictures: int, progress: Progress, sources: Sequence[str] = ()
) -> int:
    """The number of slots for so many pictures of one latent size; shown if chosen automatically."""
    if model.slots != "auto":
        return int(model.slots)
    denoiser, tuning = model.denoiser, model.tuning
    denoiser.place(grid, 1)
    count, unit = most_slots(model, pictures, model.configure_optimizers())
    if count == 1:
        return 1
    keeps_bars = tuning.kv == "stored" or denoiser.at_pivot
    slots, reason = side_by_side(
        denoiser, grid, tuning.guidance, count, keeps_bars, (tuning.negative, *sources)
    )
    progress.note(f"slots: {slots} of {count} {unit} side by side ({reason})")
    return slots


def most_slots(model: KVInversion, pictures: int, optimizer: Optimizer | None) -> tuple[int, str]:
    """How many of so many pictures, or of their timesteps, could be tuned side by side."""
    at_pivots = "pivots" in model.tuning.passes(optimizer is not None)
    count, unit = (pictures * model.steps, "timesteps") if at_pivots else (pictures, "pictures")
    alone = optimizer is not None and needs_closure(optimizer) and not reads_residuals(optimizer)
    return 1 if alone else count, unit
