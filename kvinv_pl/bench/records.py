"""The folder of a bench: the picture and the figures of every row and case, from which a bench resumes."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image

from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.runs.files import read_json, write_atomically, write_json, write_png
from kvinv_pl.errors import UserError


@dataclass(frozen=True)
class Records:
    """Pictures and figures under one folder."""

    folder: Path

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Note what all rows are computed with; raises UserError if the folder's were with something else.

        What is there and was not before is added: rows may come, and models of metrics.
        """
        file = self.folder / "bench.json"
        plain = json.loads(json.dumps(settings))
        known = read_json(file) if file.exists() else {}
        changed = [name for name, value in plain.items() if known.get(name, value) != value]
        if changed:
            name = changed[0]
            raise UserError(
                f"{self.folder} has a bench with {name} {known[name]!r}, not {plain[name]!r}: "
                "choose another folder with --out"
            )
        if known != {**known, **plain}:
            write_json(file, {**known, **plain})

    def check_cases(self, fingerprints: Mapping[str, str]) -> None:
        """Note the cases; raises UserError if the folder has others under their names."""
        file = self.folder / "cases.json"
        known = read_json(file) if file.exists() else {}
        changed = [name for name, value in fingerprints.items() if known.get(name, value) != value]
        if changed:
            raise UserError(
                f"{self.folder} has another picture, prompt or mask of the case {changed[0]}: choose another "
                "folder with --out, or give the cases as they were; new ones may follow them"
            )
        if known != (both := {**known, **fingerprints}):
            write_json(file, both)

    def add_rows(self, rows: Mapping[str, int | None]) -> None:
        """Note the rows that are asked for, each with its number of cases at most, behind those noted."""
        known = self.rows()
        if known != (rows := {**known, **rows}):
            write_json(self.folder / "rows.json", rows)

    def rows(self) -> dict[str, int | None]:
        """Every row that was asked for in this folder, in the order in which they came."""
        file = self.folder / "rows.json"
        return read_json(file) if file.exists() else {}

    def picture(self, row: str, case: str) -> Path:
        """The file of an edited picture."""
        return self.folder / "pictures" / slug(row) / f"{slug(case)}.png"

    def read(self, row: str, case: str) -> dict[str, Any] | None:
        """The record of a case: its figures, or why it failed; None where neither is known."""
        picture = self.picture(row, case)
        file = picture.with_suffix(".json")
        if not file.exists():
            return None
        record = read_json(file)
        return record if "failed" in record or picture.exists() else None

    def done(self, row: str, case: str) -> bool:
        """Whether the picture is there."""
        record = self.read(row, case)
        return record is not None and "failed" not in record

    def metrics(self, row: str, case: str) -> dict[str, float]:
        """Those of a finished case, NaN where there was nothing to judge."""
        record = self.read(row, case) or {}
        return {
            name: math.nan if value is None else value for name, value in record.get("figures", {}).items()
        }

    def save(self, row: str, case: str, picture: Image.Image, metrics: Mapping[str, float]) -> None:
        """Write a finished case; its record is last."""
        write_png(self.picture(row, case), picture)
        self.add(row, case, metrics)

    def unmeasured(self, row: str, case: str) -> dict[str, str]:
        """Why a finished case lacks figures, by their names."""
        return (self.read(row, case) or {}).get("not measured", {})

    def add(
        self, row: str, case: str, metrics: Mapping[str, float], unmeasured: Mapping[str, str] | None = None
    ) -> None:
        """Add figures to a case; `unmeasured`, why others cannot be had, replaces what was noted before."""
        plain = {
            name: value if math.isfinite(value) else None
            for name, value in {**self.metrics(row, case), **metrics}.items()
        }
        why = {"not measured": dict(unmeasured)} if unmeasured else {}
        write_json(self.picture(row, case).with_suffix(".json"), {"figures": plain, **why})

    def fail(self, row: str, case: str, reason: str) -> None:
        """Note why a case failed; it is tried again when the bench goes on."""
        write_json(self.picture(row, case).with_suffix(".json"), {"failed": " ".join(reason.split())})

    def open(self, row: str, case: str) -> Image.Image:
        """An edited picture."""
        return open_picture(self.picture(row, case)).image

    def write(self, name: str, text: str) -> Path:
        """Write a file of results."""
        write_atomically(self.folder / name, text.encode())
        return self.folder / name


def slug(name: str) -> str:
    """A name as a file's; what is replaced in it is told apart by a digest."""
    safe = re.sub(r"[^\w.+=-]+", "_", name).strip("._")[:80]
    return safe if safe == name else f"{safe}-{blake2b(name.encode(), digest_size=4).hexdigest()}"
