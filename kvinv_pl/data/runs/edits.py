"""The edits of a run folder, each a picture and the record of its settings: how they are named and found."""

import itertools
import json
import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from kvinv_pl.data.runs.files import explaining_os_errors, read_json, write_json, write_png
from kvinv_pl.errors import UserError

CHOSEN = "chosen"
"""What is written over the edit that a search has chosen."""


class Edits:
    """Edits as edits/NAME.png and .json in a run folder; edits with other settings have other names."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "edits"

    def all(self) -> list[tuple[dict[str, Any], Path]]:
        """Every edit's record and picture, oldest first."""
        records = sorted(self.folder.glob("*.json"), key=lambda file: (file.stat().st_mtime_ns, file.name))
        return [(read_json(file), file.with_suffix(".png")) for file in records]

    def save(self, slug: str, picture: Image.Image, record: Mapping[str, Any]) -> Path:
        """Write an edit; the slug gets a number where an edit with other settings has it.

        Args:
            slug: the target prompt, or a name for the edit; made fit for a file name here.
            picture: the edited picture.
            record: the target and all settings; its field "figures" (measured) is no setting.
        """
        file = self._file(slug, record)
        write_png(file.with_suffix(".png"), picture)
        write_json(file, record)  # last: an edit exists if its record does
        return file.with_suffix(".png")

    def note_search(self, target: str, judged: Mapping[Path, Mapping[str, Any]]) -> None:
        """Note what a search says of its edits of a target, by their pictures.

        What an earlier search has chosen is chosen no more. Every edit keeps its place among the others.
        """
        for record, picture in self.all():
            search = search_of(record)
            if picture in judged:
                search = judged[picture]
            elif record["target"] == target and search.get("chosen"):
                search = {**search, "chosen": False}
            if search != search_of(record):
                file = picture.with_suffix(".json")
                with explaining_os_errors("write", file):
                    times = file.stat()
                    write_json(file, {**record, "figures": {**record.get("figures", {}), "search": search}})
                    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    def find(self, slug: str, record: Mapping[str, Any]) -> Path | None:
        """The picture of an edit that was made with these very settings, if it exists and is complete."""
        file = self._file(slug, record)
        if not file.exists():
            return None
        try:
            with Image.open(file.with_suffix(".png")) as picture:
                picture.verify()
        except (OSError, SyntaxError):  # Pillow's error for a broken PNG
            return None
        return file.with_suffix(".png")

    def _file(self, slug: str, record: Mapping[str, Any]) -> Path:
        """The path of the record of an edit with these settings, whether it exists or not."""
        words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", slug).lower())[:48].strip("-") or "edit"
        names = itertools.chain([words], (f"{words}-{n}" for n in itertools.count(2)))
        possible = (self.folder / f"{name}.json" for name in names)
        return next(file for file in possible if not file.exists() or _is_same(file, record))


def search_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a search noted of an edit: whether it was chosen, agreement, likeness and judge; empty without."""
    return (record.get("figures") or {}).get("search", {})


def _is_same(file: Path, record: Mapping[str, Any]) -> bool:
    try:
        recorded = read_json(file)
    except UserError:
        return False
    expected = json.loads(json.dumps(dict(record)))
    return {**recorded, "figures": None} == {**expected, "figures": None}
