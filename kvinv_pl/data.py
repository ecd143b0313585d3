"""The pictures of a run: one, a folder of them, or a CSV or JSONL list, each with its prompts and run folder."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from kvinv_pl.errors import UserError
from kvinv_pl.store import RunStore

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
COLUMNS = ("image", "source", "targets", "mask")


@dataclass(eq=False)
class Work:
    """One picture to be worked on, and the folder where all of it lies.

    Without an `image` the folder must hold what the earlier stages left.
    """

    name: str
    store: RunStore
    image: Path | None
    source: str
    targets: list[str]
    mask: Path | None = None
    geometry: Literal["keep", "crop"] = "keep"


@dataclass(eq=False)
class Job:
    """One stage of one picture, as the trainer's predict loop hands it to the module."""

    stage: Literal["invert", "edit"]
    work: Work


class SourceImages(LightningDataModule):
    """Pictures, what they show, what they are to become, and where their runs lie.

    Args:
        image: A picture, a folder of pictures, or a .csv or .jsonl list with the columns image, source, targets
            (in a CSV separated by |) and mask; what a row leaves out is taken from the other options.
        source: What the picture shows, in a few words; may be empty.
        targets: What it should become, one edit for each.
        mask: A picture of the same size, white on the subject; for attention variants that use one.
        out: The run folder: of the one picture itself, or with a folder or list, of one folder for each.
        geometry: keep: aspect kept, results in the picture's own size. crop: the middle, in the model's shape.
        overwrite: Start runs anew where the folder holds one that was made otherwise.
        run: A run folder (or a folder of them) to go on with, in place of image, source and out.
    """

    def __init__(
        self,
        image: str | None = None,
        source: str = "",
        targets: list[str] = [],  # noqa: B006  (jsonargparse shows it)
        mask: str | None = None,
        out: str = "runs/kvinv",
        geometry: Literal["keep", "crop"] = "keep",
        overwrite: bool = False,
        run: str | None = None,
    ):
        """Read the list, if it is one; the pictures themselves are opened later, one at a time."""
        super().__init__()
        if (image is None) == (run is None):
            raise UserError("expected a picture: give --image FILE (a picture, a folder or a list), or --run FOLDER")
        self.overwrite = overwrite
        self.out = Path(run if image is None else out)
        if run is not None:
            self.works = list(_runs(Path(run), targets))
        else:
            assert image is not None
            path = Path(image)
            rows = list(_rows(path))
            defaults: dict[str, Any] = {"source": source, "targets": targets, "mask": mask}
            alone = path.suffix.lower() not in (".csv", ".jsonl") and not path.is_dir()
            folders = [self.out] if alone else _folders(self.out, [row["image"] for row in rows])
            self.works = [
                _work(row, defaults, folder, geometry) for row, folder in zip(rows, folders, strict=True)
            ]
        for work in self.works:
            _check_targets(work)
        self.fit_works: Sequence[Work] = self.works
        self.inner_steps = 1

    def train_dataloader(self) -> DataLoader[int]:
        """The inner steps of one phase; which phase it is, the curriculum knows."""
        return DataLoader(range(self.inner_steps), batch_size=None)  # pyright: ignore[reportArgumentType]

    def jobs(self, stage: Literal["invert", "edit"]) -> DataLoader[Job]:
        """One stage of every picture, for the trainer's predict loop."""
        return DataLoader([Job(stage, work) for work in self.works], batch_size=None, collate_fn=lambda job: job)  # pyright: ignore[reportArgumentType]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """What is to be worked on: rows with at least `image`, a Path."""
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise UserError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))}); name a folder that does")
        yield from ({"image": file} for file in found)
    elif path.suffix.lower() in (".csv", ".jsonl"):
        read = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
        try:
            with path.open(encoding="utf-8-sig", newline="") as lines:
                rows = list(read(path, lines))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UserError(f"cannot read the list {path}: {reason}") from error
        if not rows:
            raise UserError(f"the list {path} is empty: expected rows with {', '.join(COLUMNS)}")
        for number, row in enumerate(rows, 1):
            if not row.get("image"):
                raise UserError(f"row {number} of {path} names no image: expected the columns {', '.join(COLUMNS)}")
            for key in ("image", "mask"):  # relative to the list, wherever it is read from
                if row.get(key):
                    row[key] = path.parent / row[key]
            yield row
    else:
        yield {"image": path}


def _csv_rows(path: Path, lines: Any) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(lines, restkey="more")
    if "image" not in (reader.fieldnames or ()):
        raise UserError(f"{path} has the columns {reader.fieldnames}; expected {', '.join(COLUMNS)}")
    for row in reader:
        known = {key: value for key, value in row.items() if key in COLUMNS and value}
        if "targets" in known:
            known["targets"] = [target.strip() for target in known["targets"].split("|")]
        yield known


def _json_rows(path: Path, lines: Any) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"line {number} of {path} is not JSON: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get("targets", []), list):
                raise UserError(f"line {number} of {path}: expected an object with {', '.join(COLUMNS)} (targets: a list)")
            yield row


def _folders(out: Path, images: list[Path]) -> list[Path]:
    """A run folder for each picture, named after it; a second one of the same name gets a number."""
    taken: dict[str, int] = {}
    folders = []
    for image in images:
        taken[image.stem] = count = taken.get(image.stem, 0) + 1
        folders.append(out / (image.stem if count == 1 else f"{image.stem}-{count}"))
    return folders


def _work(row: dict[str, Any], defaults: dict[str, Any], folder: Path, geometry: Literal["keep", "crop"]) -> Work:
    told = {**defaults, **row}
    mask = Path(told["mask"]) if told["mask"] else None
    return Work(
        row["image"].name, RunStore(folder), row["image"], str(told["source"]), list(told["targets"]), mask, geometry
    )


def _runs(folder: Path, targets: list[str]) -> Iterator[Work]:
    """The finished or half-finished runs in a folder, or the one that it is."""
    stores = [RunStore(folder)] if RunStore(folder).has_run() else [
        RunStore(file.parent) for file in sorted(folder.glob("*/run.json"))
    ]  # fmt: skip
    if not stores:
        raise UserError(f"{folder} is no run folder: it has no run.json, nor has a folder in it")
    for store in stores:
        record = store.read_run()
        name, source = record["picture"]["name"], record["source"]
        mask = store.folder / "mask.png" if record["picture"]["mask"] else None
        yield Work(name, store, None, source, targets, mask, record["picture"]["mode"])


def _check_targets(work: Work) -> None:
    for target in work.targets:
        if not isinstance(target, str) or not target.strip():
            raise UserError(f"an empty target for {work.name}: say in a few words what the picture should become")
