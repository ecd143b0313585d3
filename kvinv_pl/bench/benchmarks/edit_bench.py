"""EditBench (Lin et al., 2024; `LonelVino/EditBench` on the hub) from a folder in its published layout."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from kvinv_pl.bench.benchmarks.cases import Cases, Metric
from kvinv_pl.bench.benchmarks.image_list import ImageCase, reading_json, reference_rows
from kvinv_pl.data.manifest import SUFFIXES
from kvinv_pl.errors import UserError

META, PICTURES, MASKS = "meta_json", "images", ("mask", "masks")  # the hub has mask, its card masks
SOURCE, TARGET = "original_prompt", "edited_prompt"
NAMES = ("image_path", "original_image", "image", "image_name", "file_name", "image_id", "id")
"""Where an entry has its picture: the first of these keys; else the key that it stands under."""
MASK_KEYS = ("mask_path", "mask_paths", "mask_image", "mask_images", "image_mask_path", "mask")
ACTION = "action"  # in the names of two of the types, whose cases come first


def is_edit_bench(folder: Path) -> bool:
    """Whether it is one of the folders by size (1024_1024, ...), or the folder of them."""
    return any(_parts(folder))


def _parts(folder: Path) -> Iterator[Path]:
    for place in (folder, *sorted(each for each in folder.glob("*") if each.is_dir())):
        if any(place.glob(f"{META}/*.json")):
            yield place


def edit_bench(folder: Path, count: int | None, metrics: Sequence[Metric]) -> Cases:
    """The cases of a folder, those of actions first, then by type; the first `count` of them, or all."""
    files = [file for part in _parts(folder) for file in part.glob(f"{META}/*.json")]
    cases = list(islice((case for file in sorted(files, key=_order) for case in _cases(file)), count))
    needed = (file for case in cases for file in (case.file, *case.masks))
    if missing := next((file for file in needed if not file.is_file()), None):
        raise UserError(f"EditBench names {missing}, which is not there: unpack its archives in {folder}")
    return Cases(f"EditBench in {folder.resolve()}", cases, metrics, reference_rows())


def _order(file: Path) -> tuple[bool, int, str, str]:
    number = file.stem.partition("_")[0]
    return ACTION not in file.stem, int(number) if number.isdigit() else 99, file.stem, str(file)


def _cases(file: Path) -> Iterator[ImageCase]:
    """Those of one type and one size; a list of entries, or entries by their names."""
    with reading_json(
        file, f"list of EditBench with {SOURCE}, {TARGET} and a picture in every entry"
    ) as read:
        entries = read.items() if isinstance(read, dict) else enumerate(read)
        for key, entry in entries:
            yield _case(file, str(key), entry, isinstance(read, dict))


def _case(file: Path, key: str, entry: Mapping[str, Any], by_name: bool) -> ImageCase:
    given = next(
        (str(entry[name]) for name in NAMES if entry.get(name) is not None), key if by_name else None
    )
    if given is None:
        raise KeyError(" or ".join(NAMES))
    part, kind = file.parents[1], file.stem
    picture = _found(part, (PICTURES,), kind, given)
    masks = next((entry[name] for name in MASK_KEYS if entry.get(name)), None)
    if masks is None:
        mask_file = _found(part, MASKS, kind, picture.stem)
        found = (mask_file,) if mask_file.is_file() else ()
    else:
        found = tuple(
            _found(part, MASKS, kind, str(one)) for one in ([masks] if isinstance(masks, str) else masks)
        )
    name = f"{part.name}-{kind}-{Path(given).stem}"
    source, target = (" ".join(str(entry[prompt]).split()) for prompt in (SOURCE, TARGET))
    return ImageCase(name, source, target, picture, found, kind.replace("_", " "))


def _found(part: Path, folders: Sequence[str], kind: str, given: str) -> Path:
    """A file by its path from the folder of its size, or by its name in the folder of its type."""
    name = given.removeprefix("./")
    places = [
        part / name,
        *(part / folder / at for folder in folders for at in (Path(name), Path(kind, name))),
    ]
    if Path(name).suffix.lower() not in SUFFIXES:
        places = [place.with_name(place.name + suffix) for place in places for suffix in sorted(SUFFIXES)]
    return next((place for place in places if place.is_file()), places[-1])
