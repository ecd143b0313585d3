"""The work queue of the ranks of one machine: a folder with what each has claimed, and what failed."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvinv_pl.data.runs.files import write_atomically

Shares = list[tuple[int, list[int]]]
"""Slots, and the numbers of the pictures that are tuned side by side in them."""


class WorkQueue:
    """Shared by the ranks of one machine, in files with one writer each.

    A rank claims a share by creating a file that must not exist.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Use an existing folder, empty when the command begins."""
        self.folder = Path(folder)

    def remove(self) -> None:
        """Delete the folder; another rank may do so at the same time."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, shares: Shares) -> None:
        """Publish the shares of the work."""
        _write(self.folder / "shares", shares)

    def shares(self) -> Shares | None:
        """The shares of the work; None: not published yet."""
        file = self.folder / "shares"
        return [(slots, members) for slots, members in _read(file)] if file.exists() else None

    def claim(self, share: int) -> bool:
        """Claim a share; False where another rank has it."""
        try:
            (self.folder / f"{share}.taken").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def report(self, rank: int, reasons: Mapping[str, str]) -> None:
        """Report a rank as finished, with the pictures that failed."""
        _write(self.folder / f"{rank}.failed", dict(reasons))

    def has_reported(self, rank: int) -> bool:
        """Whether a rank has finished."""
        return (self.folder / f"{rank}.failed").exists()

    def report_error(self, rank: int, message: str, trace: str) -> None:
        """Report a rank's fatal error: the message and the traceback."""
        _write(self.folder / f"{rank}.ended", [message, trace])

    def error(self, rank: int) -> tuple[str, str] | None:
        """A rank's fatal error, message and traceback; None: none was reported."""
        file = self.folder / f"{rank}.ended"
        if not file.exists():
            return None
        message, trace = _read(file)
        return message, trace

    def failures(self) -> dict[str, str]:
        """Why pictures failed, by their labels, as all ranks have reported."""
        reasons: dict[str, str] = {}
        for file in sorted(self.folder.glob("*.failed")):
            reasons |= _read(file)
        return reasons


def _write(file: Path, content: Any) -> None:
    """Write a file that others read as soon as it exists; a folder that is gone is not made again."""
    write_atomically(file, json.dumps(content).encode(), make_folder=False)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
