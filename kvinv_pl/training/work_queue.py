"""The board of the ranks of one machine: a folder where each says what it has taken, made, and given up."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Shares = list[tuple[int, list[int]]]
"""Slots, and the numbers of the pictures that are worked on side by side in them."""


class WorkQueue:
    """What the ranks of one machine tell one another, in files that each has one writer.

    What is one rank's alone is taken by making a file that must not exist.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Use a folder that is there, and empty when the command begins."""
        self.folder = Path(folder)

    def remove(self) -> None:
        """Take the board down; another rank may do so at the same time."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def give(self, shares: Shares) -> None:
        """Say what there is to do."""
        _post(self.folder / "shares", shares)

    def shares(self) -> Shares | None:
        """What there is to do; None: nobody has said so yet."""
        file = self.folder / "shares"
        return [(slots, members) for slots, members in _read(file)] if file.exists() else None

    def take(self, share: int) -> bool:
        """Whether this share of the work is the caller's; it is one rank's alone."""
        return _take(self.folder / f"{share}.taken")

    def report(self, rank: int, reasons: Mapping[str, str]) -> None:
        """Say which pictures a rank has given up, which is the last that it says."""
        _post(self.folder / f"{rank}.failed", dict(reasons))

    def has_reported(self, rank: int) -> bool:
        """Whether a rank has said that it has nothing more to do."""
        return (self.folder / f"{rank}.failed").exists()

    def fail(self, rank: int, why: str, where: str) -> None:
        """Say why a rank ends before all is done, in one line, and where in its program."""
        _post(self.folder / f"{rank}.ended", [why, where])

    def failed(self, rank: int) -> tuple[str, str] | None:
        """Why a rank has ended before all was done, and where in its program; None: it has not said so."""
        file = self.folder / f"{rank}.ended"
        if not file.exists():
            return None
        why, where = _read(file)
        return why, where

    def reported(self) -> dict[str, str]:
        """Why pictures were given up, by their labels, as the ranks have reported."""
        reasons: dict[str, str] = {}
        for file in sorted(self.folder.glob("*.failed")):
            reasons |= _read(file)
        return reasons


def _post(file: Path, what: Any) -> None:
    """Write a file as a whole: it is read as soon as it is there."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(what), encoding="utf-8")
    os.replace(unfinished, file)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _take(file: Path) -> bool:
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
