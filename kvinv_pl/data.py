"""The pictures of a run: one, a folder, or a CSV or JSONL list, each with its prompts and its run folder."""

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from kvinv_pl.errors import UserError
from kvinv_pl.store import RunStore
from kvinv_pl.work import Work

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
LISTS = (".csv", ".jsonl")
COLUMNS = ("image", "source", "targets", "mask")


@dataclass(eq=False)
class Job:
    """One stage of one picture, as the trainer's predict loop hands it to the module."""

    stage: Literal["invert", "edit"]
    work: Work


class SourceImages(LightningDataModule):
    """Pictures, what they show, what they are to become, and where their runs lie.

    Args:
        image: A picture, a folder of pictures, or a .csv or .jsonl list with the columns image, source,
            targets (separated by |, or a JSON list) and mask, paths as seen from the list; what a row leaves
            out is taken from the other options, and rows of one picture and source share its run.
        source: What the picture shows, in a few words; may be empty.
        targets: What it should become, one edit for each.
        mask: A picture of the same size, white on the subject; for attention variants that use one.
        out: The run folder: of the one picture itself, or with a folder or list, of one folder for each.
        geometry: keep: aspect kept, results in the picture's size. crop: the middle, in the model's shape.
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
        if image is not None and run is not None:
            raise UserError("expected either image or run, got both: a run folder knows its picture")
        if image is None and run is None:
            raise UserError(
                "no picture: give --image FILE (a picture, a folder or a list) or, to edit, --run DIR"
            )
        for name, path in {"image": image, "out": out, "run": run}.items():
            if path is not None and not path.strip():  # which would be the working directory
                raise UserError(f"{name}: expected a path, got an empty text")
        self.overwrite = overwrite
        self.works: list[Work]
        self.failed: dict[str, str] = {}
        if run is not None:
            self.out = Path(run).expanduser()
            self.works = list(_runs(self.out, targets, self.failed))
        elif image is not None:
            self.out, path = Path(out).expanduser(), Path(image).expanduser()
            given = Path(mask).expanduser() if mask else None
            rows = _merged(_told(row, source, targets, given) for row in _rows(path))
            alone = path.suffix.lower() not in LISTS and not path.is_dir()
            folders = [self.out] if alone else _folders(self.out, [row.image for row in rows])
            self.works = [
                Work(row.image.name, RunStore(folder), row.image, row.source, row.targets, row.mask, geometry)
                for row, folder in zip(rows, folders, strict=True)
            ]
        for work in self.works:
            _check_targets(work)
        self.inner_steps = 1

    def train_dataloader(self) -> DataLoader[int]:
        """The inner steps of one phase; which phase it is, the curriculum knows."""
        return DataLoader(range(self.inner_steps), batch_size=None)  # pyright: ignore[reportArgumentType]

    def jobs(self, stage: Literal["invert", "edit"], works: Iterable[Work] | None = None) -> DataLoader[Job]:
        """One stage of these pictures (None: of all), for the trainer's predict loop."""
        found: Any = [Job(stage, work) for work in (self.works if works is None else works)]
        return DataLoader(found, batch_size=None, collate_fn=lambda job: job)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """What is to be worked on: rows with at least `image`, a Path."""
    if path.is_dir():
        try:
            files = sorted(path.iterdir())
        except OSError as error:
            raise UserError(f"cannot read the folder {path}: {error.strerror or error}") from error
        found = [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
        if not found:
            raise UserError(
                f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))}): name a folder that does"
            )
        yield from ({"image": file} for file in found)
    elif path.suffix.lower() in LISTS:
        read = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
        try:
            with path.open(encoding="utf-8-sig", newline="") as lines:
                rows = list(read(path, lines))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UserError(f"cannot read the list {path}: {reason}") from error
        if not rows:
            raise UserError(f"the list {path} is empty: expected rows with {', '.join(COLUMNS)}")
        for number, row in rows:
            if not row.get("image"):
                raise UserError(f"line {number} of {path} names no image: expected {', '.join(COLUMNS)}")
            for key in {"image", "mask"} & set(row):
                row[key] = path.parent / Path(row[key]).expanduser()
            yield row
    else:
        yield {"image": path}


def _csv_rows(path: Path, lines: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(lines, restkey="", restval="", strict=True)
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        _check_columns(path, reader.fieldnames)
        for row in reader:
            if row.get(""):
                raise UserError(
                    f"line {reader.line_num} of {path} has more fields than there are columns: quote commas"
                )
            known = {key: row[key].strip() for key in COLUMNS if row.get(key, "").strip()}
            yield (
                reader.line_num,
                known | ({"targets": _split(known["targets"])} if "targets" in known else {}),
            )
    except csv.Error as error:
        raise UserError(f"line {reader.line_num + 1} of {path} is not CSV: {error}") from error


def _json_rows(path: Path, lines: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"line {number} of {path} is not JSON ({error}): expected an object a line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(
                    f"line {number} of {path}: expected an object with {', '.join(COLUMNS)}, got {row!r:.40}"
                )
            _check_columns(path, list(row))
            row = {key: value for key in COLUMNS if (value := row.get(key)) is not None}
            if isinstance(row.get("targets"), str):
                row["targets"] = _split(row["targets"])
            for key, value in row.items():
                kind = list if key == "targets" else str
                if not isinstance(value, kind) or not all(isinstance(text, str) for text in value):
                    wanted = "a list of texts" if kind is list else "text"
                    raise UserError(f"line {number} of {path}: {key}: expected {wanted}, got {value!r:.40}")
            yield number, row


def _check_columns(path: Path, names: Sequence[str]) -> None:
    """Refuse a list without images, or with a column that is nearly one of ours; others may be there."""
    for name in names:
        near = get_close_matches(name, [column for column in COLUMNS if column not in names], 1, 0.8)
        if name not in COLUMNS and near:
            raise UserError(f"{path} has a column {name!r}: rename it to {near[0]}")
    if "image" not in names:
        raise UserError(
            f"{path} has the columns {', '.join(names) or '(none)'}: expected {', '.join(COLUMNS)}"
        )


def _split(targets: str) -> list[str]:
    return [target.strip() for target in targets.split("|")]


@dataclass
class _Told:
    """A row with what the options say where it says nothing."""

    image: Path
    source: str
    targets: list[str]
    mask: Path | None


def _told(row: dict[str, Any], source: str, targets: list[str], mask: Path | None) -> _Told:
    return _Told(
        row["image"], row.get("source", source), list(row.get("targets", targets)), row.get("mask", mask)
    )


def _merged(rows: Iterable[_Told]) -> list[_Told]:
    """One row for each picture, source and mask: the targets of several share its tuning."""
    merged: dict[tuple[Any, ...], _Told] = {}
    for row in rows:
        first = merged.setdefault((row.image.absolute(), row.source, row.mask), row)
        if first is not row:
            first.targets += [target for target in row.targets if target not in first.targets]
    return list(merged.values())


def _folders(out: Path, images: list[Path]) -> list[Path]:
    """A run folder for each picture, named after it; a second one of the same name gets a number."""
    taken: set[str] = set()
    folders = []
    for image in images:
        names = itertools.chain([image.stem], (f"{image.stem}-{n}" for n in itertools.count(2)))
        name = next(name for name in names if name.lower() not in taken)  # as some file systems compare them
        taken.add(name.lower())
        folders.append(out / name)
    return folders


def stores_in(folder: Path) -> list[RunStore]:
    """The run folder that this is, or those that lie in it."""
    if RunStore(folder).has_run():
        return [RunStore(folder)]
    stores = [RunStore(file.parent) for file in sorted(folder.glob("*/run.json"))]
    if not stores:
        found = "it has no run.json, nor has a folder in it" if folder.is_dir() else "there is no such folder"
        raise UserError(f"{folder} is no run folder: {found}; name one that `kvinv fit` or `kvinv run` made")
    return stores


@contextmanager
def reading(store: RunStore) -> Iterator[None]:
    """Say which field a run.json lacks, where one is read."""
    try:
        yield
    except (KeyError, TypeError) as error:
        file = store.folder / "run.json"
        raise UserError(f"{file} is damaged (it lacks {error}): remove the run and make it again") from error


def _runs(folder: Path, targets: list[str], failed: dict[str, str]) -> Iterator[Work]:
    """The finished or half-finished runs in a folder, or the one that it is; the damaged go to `failed`."""
    stores = stores_in(folder)
    for store in stores:
        try:
            with reading(store):
                record = store.read_run()
                picture, source = record["picture"], record["source"]
                mask = store.folder / "mask.png" if picture["mask"] else None
                work = Work(picture["name"], store, None, source, targets, mask, picture["mode"])
        except UserError as error:
            if len(stores) == 1:
                raise
            failed[str(store.folder)] = str(error)
            continue
        yield work


def _check_targets(work: Work) -> None:
    for target in work.targets:
        if not target.strip():
            raise UserError(
                f"an empty target for {work.name}: say in a few words what the picture should become"
            )
