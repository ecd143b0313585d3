"""The pictures of a run: one, a folder, or a list, each with its prompts and its run folder."""

import copy
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import Self

from kvinv_pl.data.images.geometry import Mode
from kvinv_pl.data.manifest import LISTS, rows_of
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.data.source_image import SourceImage, images_in
from kvinv_pl.errors import UserError
from kvinv_pl.stages.progress import Observers
from kvinv_pl.stages.settings import EditSettings, InversionSettings


@dataclass(eq=False)
class Job:
    """One stage of one picture, as the trainer's predict loop passes it to the module."""

    image: SourceImage
    settings: InversionSettings | EditSettings
    observers: Observers
    overwrite: bool
    """Whether an existing edit is rendered again."""


class SourceImages(LightningDataModule):
    """Pictures with their prompts, targets and run folders.

    Args:
        image: A picture, a folder of pictures, or a .csv, .tsv or .jsonl list. A list has the columns image,
            source, targets (separated by |, or a JSON list) and mask, with paths relative to the list; what a
            row leaves out is taken from the other options, and rows with the same picture, source and mask
            share one run.
        source: The source prompt: what the picture shows, in a few words; may be empty, but edits are then
            guided by the whole target, not by what it changes.
        targets: The target prompts: what the picture should become, one edit for each; default with run:
            those of the run.
        mask: A picture of the same size, white on the subject; for attention variants that use one.
        out: The run folder; for a folder or list of pictures, the folder that gets a run folder for each.
        geometry: keep: keep the aspect ratio, results have the picture's size. crop: the centre, in the
            model's shape.
        overwrite: Replace runs that were made with other settings, and render existing edits again.
        run: A run folder (or a folder of them) to resume or edit, instead of image, source and out.
        invert_mask: Invert masks: black (or transparent) on the subject.
        size: The working size: the shorter side, in pixels, of what the model sees; a smaller one takes less
            memory, disk and time. Default: what the checkpoint was made for. Results keep the picture's size.
    """

    needs_pictures = True

    def __init__(
        self,
        image: str | None = None,
        source: str = "",
        targets: list[str] = [],  # noqa: B006  (jsonargparse shows it)
        mask: str | None = None,
        out: str = "runs/kvinv",
        geometry: Mode = "keep",
        overwrite: bool = False,
        run: str | None = None,
        invert_mask: bool = False,
        size: int | None = None,
    ):
        """Read the list, if it is one; the pictures themselves are opened later, one at a time."""
        super().__init__()
        if image is not None and run is not None:
            raise UserError("expected either image or run, got both: a run folder has its picture")
        if size is not None and run is not None:
            raise UserError(f"size: expected none with run, which has its own, got {size}")
        if image is None and run is None and self.needs_pictures:
            raise UserError(
                "no picture: give --image FILE (a picture, a folder or a list) or, to edit, --run DIR"
            )
        for name, path in {"image": image, "out": out, "run": run}.items():
            if path is not None and not path.strip():  # which would be the working directory
                raise UserError(f"{name}: expected a path, got an empty text")
        self.overwrite = overwrite
        self.size, self.out = size, Path(out).expanduser()
        self.images: list[SourceImage] = []
        self.failed: dict[str, str] = {}
        self.notes: list[str] = []
        """Lines for the user about what was found."""
        if run is not None:
            self.out = Path(run).expanduser()
            self.images = list(images_in(self.out, targets, self.failed))
        elif image is not None:
            path = Path(image).expanduser()
            default_mask = Path(mask).expanduser() if mask else None
            rows = rows_of(path, source, targets, default_mask, self.notes)
            is_single = path.suffix.lower() not in LISTS and not path.is_dir()
            folders = [self.out] if is_single else _folders(self.out, [row.image for row in rows])
            counts = Counter(row.image for row in rows)
            self.images = [
                SourceImage(
                    row.image.name, RunStore(folder), row.image, row.source, row.targets, row.mask,
                    geometry, invert_mask, size, shared=counts[row.image] > 1,
                )
                for row, folder in zip(rows, folders, strict=True)
            ]  # fmt: skip
        _check_targets(self.images)
        if invert_mask and (run is not None or not any(each.mask for each in self.images)):
            raise UserError("invert_mask: expected a mask with it: give --mask, or leave it out")
        self.inner_steps = 1

    def only(self, images: Iterable[SourceImage]) -> Self:
        """These pictures alone; their run folders and everything else are the same."""
        view = copy.copy(self)
        view.images, view.failed = list(images), {}
        return view

    def train_dataloader(self) -> DataLoader[int]:
        """The inner steps of one phase."""
        return DataLoader(range(self.inner_steps), batch_size=None)  # pyright: ignore[reportArgumentType]

    def jobs(
        self, images: Iterable[SourceImage], settings: InversionSettings | EditSettings, observers: Observers
    ) -> DataLoader[Job]:
        """The stage of these settings, of these pictures, for the trainer's predict loop."""
        jobs: Any = [Job(image, settings, observers, self.overwrite) for image in images]
        return DataLoader(jobs, batch_size=None, collate_fn=lambda job: job)


class PlannedImages(SourceImages):
    """Pictures that are planned for; there may be none."""

    __doc__ = SourceImages.__doc__
    needs_pictures = False


def _folders(out: Path, images: list[Path]) -> list[Path]:
    """A run folder for each picture, named after it; a second one of the same name gets a number."""
    taken: set[str] = set()
    folders = []
    for image in images:
        names = itertools.chain([image.stem], (f"{image.stem}-{n}" for n in itertools.count(2)))
        name = next(name for name in names if name.lower() not in taken)  # some file systems ignore case
        taken.add(name.lower())
        folders.append(out / name)
    return folders


def _check_targets(images: Iterable[SourceImage]) -> None:
    for image in images:
        if not all(target.strip() for target in image.targets):
            raise UserError(
                f"an empty target for {image.name}: say in a few words what the picture should become"
            )
