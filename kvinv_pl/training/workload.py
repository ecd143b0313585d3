"""The workload of a command: groups pictures into shares, locks their run folders."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from kvinv_pl.data.failures import Failures
from kvinv_pl.data.source_image import SourceImage, Stage
from kvinv_pl.errors import UserError
from kvinv_pl.models.input_warnings import skipped_timesteps, truncated_prompts, unknown_words
from kvinv_pl.stages.progress import Progress
from kvinv_pl.stages.settings import EditSettings
from kvinv_pl.training.admission import check_image, choose_slots
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.devices.work_queue import Shares
from kvinv_pl.training.module import KVInversion

KEPT_LOADED = 8
"""Pictures that stay in memory from the check to their turn; more of them are read a second time."""


class Workload:
    """Pictures, and the stages that they go through; pictures known to fail are marked from the start."""

    def __init__(
        self,
        model: KVInversion,
        data: SourceImages,
        stages: Sequence[Stage],
        dry_run: bool,
        editing: EditSettings | None = None,
    ) -> None:
        """Mark as failed the pictures that were not found, or that have no target to edit to.

        A dry run is Lightning's fast_dev_run: the first picture only, and nothing is written.
        """
        self.editing = editing or model.editing
        self.model, self.data, self.stages, self.dry_run = model, data, stages, dry_run
        self.failures = Failures(len(data.images) + len(data.failed))
        self.failures.reasons |= data.failed
        self._quality: dict[SourceImage, tuple[float, int] | None] = {}
        """As `_quality_of` has it, of the pictures whose runs were held here."""
        for image in data.images if "edit" in stages else ():
            if not image.targets:
                self.failures.note(
                    image.label,
                    f"no target for {image.name}: say with --target what it should become (repeatable)",
                )

    def shares(self, devices: int | None, device: torch.device, progress: Progress) -> Shares:
        """Group pictures that can be tuned side by side, with their slots; mark the others as failed.

        Without a number of `devices` every rank computes the shares on its own.
        """
        groups: dict[tuple[int, int, bool], list[int]] = {}
        for n, image in enumerate(self.data.images[:1] if self.dry_run else self.data.images):
            if image not in self.failures:
                with self.failures.catching([image]):
                    groups.setdefault(self._check(image, self.data.overwrite), []).append(n)
            if n >= KEPT_LOADED:
                image.close()
        if len(self.failures.reasons) == self.failures.total:
            self.failures.raise_failures()
        shares = []
        for (height, width, _), members in groups.items():
            slots, share_size = 1, 1
            if "fit" in self.stages:
                self.model.to(device)
                # spread the pictures over the devices
                per_device = -(-len(members) // devices) if devices else 1
                sources = [self.data.images[member].source for member in members]
                slots = choose_slots(self.model, (height, width), per_device, progress, sources)
                # slots chosen automatically may be more than pictures: they hold timesteps, too
                share_size = min(slots, per_device) if self.model.slots == "auto" else slots
            shares += [
                (slots, members[begin : begin + share_size]) for begin in range(0, len(members), share_size)
            ]
        return shares

    def notes(self) -> list[str]:
        """Lines for the user: what was skipped, targets that change nothing, and prompts that are cut."""
        prompts = [
            ("negative prompt", text) for text in (self.model.inverting.negative, self.editing.negative)
        ]
        same, without = list[str](), list[str]()
        for image in self.failures.remaining(self.data.images):
            if not image.source.strip():
                without.append(image.label)
            if image.source in image.targets:
                same.append(f"{image.label}: a target is the source prompt, so that its edit changes nothing")
            prompts += [("source prompt", image.source), *(("target", target) for target in image.targets)]
        if without:
            more = f" and {len(without) - 1} more" if len(without) > 1 else ""
            same.append(
                f"{without[0]}{more}: the source prompt is empty, and edits are guided by the whole target, "
                "not by what it changes; --source says what the picture shows"
            )
        backbone = self.model.denoiser.backbone
        lost = unknown_words(backbone, prompts) if self.model.checkpoint == "menagerie" else ()
        return [*self.data.notes, *same, *truncated_prompts(backbone, prompts), *lost]

    def choices(self, precision: str | None) -> list[str]:
        """Lines for the user: what was merged into the checkpoint, and what follows from it and the device.

        The precision is the one that was chosen, if it was not given.
        """
        chosen = list[str]()
        if self.editing is self.model.editing and self.stages != ["invert"]:
            chosen += [f"{name.replace('_', ' ')} {w:g}" for name, w in self.model.chosen_defaults.items()]
        chosen += [f"precision {precision}"] if precision else []
        lines = [f"chosen by checkpoint and device: {', '.join(chosen)}"] if chosen else []
        denoiser = self.model.denoiser
        if "invert" in self.stages and (line := skipped_timesteps(denoiser.backbone, denoiser.table)):
            lines.insert(0, line)
        return [*denoiser.backbone.notes, *lines]

    def results(self, with_quality: bool) -> Iterator[str]:
        """Lines for the user: where to look, with what quality where that was not shown, and what helps."""
        tries, required = 0, self.model.tuning.required_psnr
        for image in self.failures.remaining(self.data.images):
            folder = image.store.folder
            names = ("sheet.png", "reconstruction.png", "run.json")
            found = next((file for name in names if (file := folder / name).exists()), folder)
            if folder.exists():  # others may be on another machine
                yield f"look at {found}"
            if "fit" not in self.stages:
                continue
            quality = self._quality[image] if image in self._quality else _quality_of(image)
            if quality is not None and quality[0] < required:
                tries = max(tries, quality[1])
                if with_quality:
                    yield (
                        f"  its reconstruction, {quality[0]:.1f} dB to the VAE round trip, is below the "
                        f"{required:g} dB required"
                    )
        if tries:
            bar = f"a reconstruction is below {required:g} dB"
            yield (
                f"{bar}: give the command again with --model.retries {tries + 1}; it tunes on, each time "
                "with twice the inner steps"
                if self.model.denoiser.learns
                else f"{bar}, and nothing is learned: take --model.attention full_kv, with --overwrite"
            )

    @contextmanager
    def locked(self, images: Sequence[SourceImage]) -> Iterator[None]:
        """Lock the run folders; remove new ones where nothing was written."""
        fresh = [image.store.folder for image in images if not image.store.folder.exists()]
        try:
            with ExitStack() as locks:
                for image in images:
                    with self.failures.catching([image]):
                        locks.enter_context(image.store.lock())
                        if self.data.overwrite and self._is_stale(image):
                            image.store.clear()
                        elif image.store.has_run():
                            image.store.settle()
                yield
                for image in self.failures.remaining(images) if "fit" in self.stages else ():
                    self._quality[image] = _quality_of(image)  # read already, while it is held
        finally:
            for image in images:
                image.close()
            for folder in fresh:
                if folder.is_dir() and set(os.listdir(folder)) <= {".lock"}:  # on Windows it is gone already
                    (folder / ".lock").unlink(missing_ok=True)
                    folder.rmdir()

    def _check(self, image: SourceImage, overwrite: bool) -> tuple[int, int, bool]:
        """Open the picture; check that its run folder is of the same run, or may be overwritten."""
        stage: Stage = "fit" if "fit" in self.stages else self.stages[-1]
        # asked before: another rank may replace the run meanwhile, and all have to find the same
        replaceable = overwrite and image.path is not None and image.store.has_run()
        with image.store.read_once():
            try:
                return check_image(self.model, image, stage, self.editing)
            except UserError:
                if not replaceable:
                    raise
                return check_image(self.model, image, stage, self.editing, replace_run=True)

    def _is_stale(self, image: SourceImage) -> bool:
        """Whether the run folder holds another run."""
        try:
            self._check(image, overwrite=False)
        except UserError:
            return image.path is not None and image.store.has_run()
        return False


def _quality_of(image: SourceImage) -> tuple[float, int] | None:
    """The PSNR to the VAE round trip in dB, and the number of attempts; None where nothing is certified."""
    figures = image.store.read_run().get("reconstruction") if image.store.has_run() else None
    return None if figures is None else (figures["psnr_to_round_trip"], len(figures["attempts"]))
