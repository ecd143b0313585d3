"""The rows of the input: one picture, a folder, or a list as CSV, TSV or JSONL."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kvinv_pl.data.images.pictures import is_picture
from kvinv_pl.data.runs.files import explaining_os_errors
from kvinv_pl.errors import UserError

SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif"),
    *(".jp2", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"),
}
"""Of files that are taken for pictures without a look into them, so that a damaged one is reported."""
LISTS = (".csv", ".tsv", ".jsonl")
SEPARATORS = ",;\t"
COLUMNS = ("image", "source", "targets", "mask")


@dataclass
class Row:
    """One picture with its source prompt, target prompts and mask."""

    image: Path
    source: str
    targets: list[str]
    mask: Path | None


def rows_of(
    path: Path, source: str, targets: list[str], mask: Path | None, notes: list[str] | None = None
) -> list[Row]:
    """The rows of a picture, a folder or a list; options fill what a row leaves out.

    Args:
        path: Of the picture, folder or list.
        source: The source prompt of rows without one.
        targets: Those of rows without any.
        mask: The mask of rows without one.
        notes: Gets a line about files of a folder that are not pictures.
    """
    merged: dict[tuple[Any, ...], Row] = {}  # the targets of one picture, source and mask share its tuning
    for given in _rows(path, [] if notes is None else notes):
        prompts = list(given.get("targets", targets))
        row = Row(given["image"], given.get("source", source), prompts, given.get("mask", mask))
        first = merged.setdefault((row.image.absolute(), row.source, row.mask), row)
        if first is not row:
            first.targets += [target for target in row.targets if target not in first.targets]
    return list(merged.values())


def _rows(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Rows with at least `image`, a Path."""
    if path.is_dir():
        yield from ({"image": file} for file in _pictures_in(path, notes))
    elif path.suffix.lower() in LISTS:
        read = _json_rows if path.suffix.lower() == ".jsonl" else _csv_rows
        try:
            with path.open(encoding="utf-8-sig", newline="") as lines:
                rows = list(read(path, lines))
        except (OSError, UnicodeDecodeError) as error:
            known = isinstance(error, OSError)
            reason = f"{error.strerror}; check the path" if known else "it is not UTF-8 text: save it as such"
            raise UserError(f"cannot read the list {path}: {reason}") from error
        if not rows:
            raise UserError(f"the list {path} is empty: expected rows with {', '.join(COLUMNS)}; add some")
        for number, row in rows:
            if not row.get("image"):
                raise UserError(
                    f"line {number} of {path} names no image: expected {', '.join(COLUMNS)}; give it one or "
                    "take it out"
                )
            for key in {"image", "mask"} & set(row):
                row[key] = path.parent / Path(row[key]).expanduser()
            yield row
    else:
        yield {"image": path}


def _pictures_in(folder: Path, notes: list[str]) -> list[Path]:
    """The pictures in a folder, by suffix or else by content; what is skipped goes into a line of `notes`."""
    with explaining_os_errors("read", folder):
        files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]

    def is_taken(file: Path) -> bool:
        named = file.suffix.lower() in SUFFIXES and not file.is_dir()
        return named or (file.is_file() and is_picture(file))

    taken = [file for file in files if is_taken(file)]
    masks = masks_among(taken)
    pictures = [file for file in taken if file not in masks]
    skipped = [f"{file.name}{'/' if file.is_dir() else ''}" for file in files if file not in taken]
    named = ", ".join(skipped[:5]) + (f" and {len(skipped) - 5} more" if len(skipped) > 5 else "")
    if not pictures:
        got = f"got {named}" if skipped else "it is empty"
        raise UserError(f"{folder} contains no pictures ({got}): name a folder that does")
    if skipped:
        notes.append(f"skipped in {folder}, as they are not pictures: {named}")
    if masks:
        notes.append(
            f"skipped in {folder}, as they are masks by their names: {masks[0].name}"
            + (f" and {len(masks) - 1} more" if len(masks) > 1 else "")
            + "; a list with the column mask gives each picture its own"
        )
    return pictures


def masks_among(files: Sequence[Path]) -> list[Path]:
    """Those named NAME-mask, as `kvinv world` and `kvinv mask` do, beside a picture NAME."""
    names = {file.stem for file in files}
    return [
        file for file in files if file.stem.endswith("-mask") and file.stem.removesuffix("-mask") in names
    ]


def _csv_rows(path: Path, lines: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    header = lines.readline()
    lines.seek(0)
    separator = _separator(header)
    reader = csv.DictReader(lines, restkey="", restval="", strict=True, delimiter=separator)
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        _check_columns(path, reader.fieldnames)
        for row in reader:
            if row.get(""):
                name = {",": "commas", ";": "semicolons", "\t": "tabs"}[separator]
                raise UserError(
                    f"line {reader.line_num} of {path} has more fields than there are columns: quote {name}"
                )
            known = {key: row[key].strip() for key in COLUMNS if row.get(key, "").strip()}
            yield (
                reader.line_num,
                known | ({"targets": _split(known["targets"])} if "targets" in known else {}),
            )
    except csv.Error as error:
        raise UserError(
            f"line {reader.line_num + 1} of {path} is not CSV: {error}; save the list as CSV again"
        ) from error


def _separator(header: str) -> str:
    """The separator that makes `image` a column; a comma where none does."""

    def names_image(separator: str) -> bool:
        return "image" in (name.strip().strip('"').strip().lower() for name in header.split(separator))

    return next(filter(names_image, SEPARATORS), ",")


def _json_rows(path: Path, lines: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"line {number} of {path} is not JSON ({error}): expected one object per line; "
                    "fix the line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(
                    f"line {number} of {path}: expected an object with {', '.join(COLUMNS)}, got "
                    f"{row!r:.40}; fix it"
                )
            _check_columns(path, list(row))
            row = {key: value for key in COLUMNS if (value := row.get(key)) is not None}
            if isinstance(row.get("targets"), str):
                row["targets"] = _split(row["targets"])
            for key, value in row.items():
                kind = list if key == "targets" else str
                if not isinstance(value, kind) or not all(isinstance(text, str) for text in value):
                    wanted = "a list of texts" if kind is list else "text"
                    raise UserError(
                        f"line {number} of {path}: {key}: expected {wanted}, got {value!r:.40}; fix it"
                    )
            yield number, row


def _check_columns(path: Path, names: Sequence[str]) -> None:
    """Refuse a list without images, or with a misspelt column; other columns are ignored."""
    for name in names:
        near = get_close_matches(name, [column for column in COLUMNS if column not in names], 1, 0.8)
        if name not in COLUMNS and near:
            raise UserError(f"{path} has a column {name!r}: rename it to {near[0]}")
    if "image" not in names:
        raise UserError(
            f"{path} has the columns {', '.join(names) or '(none)'}: expected {', '.join(COLUMNS)}; name the "
            "column with the pictures image"
        )


def _split(targets: str) -> list[str]:
    return [target.strip() for target in targets.split("|")]
