"""What a command is to do: the stages that pictures go through, and which pictures side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from kvinv_pl.data.failures import Failures
from kvinv_pl.data.source_image import SourceImage, Stage
from kvinv_pl.errors import UserError
from kvinv_pl.stages.progress import Progress
from kvinv_pl.stages.settings import EditSettings
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.work_queue import Shares


class Workload:
    """Pictures, and the stages that they go through; what is known to fail is given up from the start."""

    def __init__(
        self,
        model: KVInversion,
        data: SourceImages,
        stages: Sequence[Stage],
        rehearsal: bool,
        editing: EditSettings | None = None,
    ) -> None:
        """Give up the pictures that could not be found, or that are to be edited to nothing.

        Args:
            model: The module; its checkpoint need not be loaded yet.
            data: The pictures.
            stages: In their order.
            rehearsal: Whether nothing is kept, and the first picture is enough.
            editing: How the pictures are edited; None: as the model's settings say.
        """
        self.editing = editing or model.editing
        self.model, self.data, self.stages, self.rehearsal = model, data, stages, rehearsal
        self.failures = Failures(len(data.works) + len(data.failed))
        self.failures.reasons |= data.failed
        for work in data.works if "edit" in stages else ():
            if not work.targets:
                self.failures.note(
                    work.label,
                    f"no target for {work.name}: say with --target what it should become (repeatable)",
                )

    def shares(self, devices: int | None, device: torch.device, progress: Progress) -> Shares:
        """Pictures that are worked on side by side, and their slots; what cannot be worked on is given up.

        Args:
            devices: How many there are of this machine; None: others decide alike, and cannot be asked.
            device: Of the model, whose memory is looked at.
            progress: Where the slots are told that were not given.
        """
        alike: dict[tuple[int, int, bool], list[int]] = {}
        for n, work in enumerate(self.data.works[:1] if self.rehearsal else self.data.works):
            if work not in self.failures:
                with self.failures.of([work]):
                    alike.setdefault(self._check(work, self.data.overwrite), []).append(n)
        if len(self.failures.reasons) == self.failures.total:
            self.failures.report()
        shares = []
        for (height, width, _), members in alike.items():
            slots, each = 1, 1
            if "fit" in self.stages:
                self.model.to(device)
                # no device is to wait while another has all the pictures
                of_a_device = -(-len(members) // devices) if devices else 1
                slots = self.model.choose_slots((height, width), of_a_device, progress)
                # slots of one's own choice are for timesteps, too, where there are not as many pictures
                each = min(slots, of_a_device) if self.model.slots == "auto" else slots
            shares += [(slots, members[begin : begin + each]) for begin in range(0, len(members), each)]
        return shares

    def of_share(self, share: tuple[int, list[int]]) -> list[SourceImage]:
        """The pictures of a share."""
        return [self.data.works[member] for member in share[1]]

    @contextmanager
    def held(self, works: Sequence[SourceImage]) -> Iterator[None]:
        """Hold the run folders, and leave none where nothing came of it."""
        fresh = [work.store.folder for work in works if not work.store.folder.exists()]
        try:
            with ExitStack() as held:
                for work in works:
                    with self.failures.of([work]):
                        held.enter_context(work.store.lock())
                        if self.data.overwrite and self._is_stale(work):
                            work.store.clear()
                        elif work.store.has_run():
                            work.store.settle()
                yield
        finally:
            for work in works:
                work.close()
            for folder in fresh:
                if folder.is_dir() and os.listdir(folder) == [".lock"]:
                    (folder / ".lock").unlink()
                    folder.rmdir()

    def _check(self, work: SourceImage, overwrite: bool) -> tuple[int, int, bool]:
        """Open the picture, and see that what lies in its run folder belongs to it, or may be overwritten."""
        stage: Stage = "fit" if "fit" in self.stages else self.stages[-1]
        with work.store.read_once():
            try:
                return self.model.check(work, stage, self.editing)
            except UserError:
                if not (overwrite and work.path is not None and work.store.has_run()):
                    raise
                return self.model.check(work, stage, self.editing, anew=True)

    def _is_stale(self, work: SourceImage) -> bool:
        """Whether what lies in the run folder is of something else."""
        try:
            self._check(work, overwrite=False)
        except UserError:
            return work.path is not None and work.store.has_run()
        return False
