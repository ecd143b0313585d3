"""The board of the ranks of one machine: a folder where each says what it has taken, made, and given up."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvinv_pl.stages.curriculum import Phase

Shares = list[tuple[int, list[int]]]
"""Slots, and the numbers of the pictures that are worked on side by side in them."""


@dataclass(frozen=True)
class Offer:
    """Phases that do not depend on each other, for whichever rank is free; the owner of the share waits."""

    folder: Path
    share: int
    attempt: int
    plan: tuple[Phase, ...]

    def take(self, n: int) -> bool:
        """Whether phase n is the caller's; it is one rank's alone, and nobody's once it was withdrawn."""
        return (self.folder / "plan").exists() and _take(self.folder / f"{n}.taken")

    def give_back(self, n: int) -> None:
        """Phase n, taken before, is for another rank to make."""
        (self.folder / f"{n}.taken").unlink()

    def withdraw(self) -> None:
        """Offer nothing any more."""
        (self.folder / "plan").unlink(missing_ok=True)  # as where the board was taken down

    def done(self, n: int, reasons: Mapping[str, str]) -> None:
        """Phase n, taken before, is written; why pictures were given up, by their labels."""
        _post(self.folder / f"{n}.done", dict(reasons))

    @property
    def has_more(self) -> bool:
        """Whether there is a phase that nobody has taken."""
        return any(not (self.folder / f"{n}.taken").exists() for n in range(len(self.plan)))

    @property
    def is_done(self) -> bool:
        """Whether every phase is written, by whichever rank."""
        return all((self.folder / f"{n}.done").exists() for n in range(len(self.plan)))

    def given_up(self) -> dict[str, str]:
        """Why any rank has given pictures up, by their labels, in the phases that are done."""
        reasons: dict[str, str] = {}
        for file in sorted(self.folder.glob("*.done")):
            reasons |= _read(file)
        return reasons


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

    def end(self, share: int) -> None:
        """All of this share is done; nothing more of it will be offered."""
        _post(self.folder / f"{share}.over", None)

    def has_ended(self, share: int) -> bool:
        """Whether all of this share is done."""
        return (self.folder / f"{share}.over").exists()

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

    def offer(self, share: int, attempt: int, plan: Sequence[Phase]) -> Offer:
        """Let other ranks work on phases of a share, of this attempt at tuning it."""
        folder = self.folder / f"{share}-{attempt}"
        folder.mkdir()
        said = {"share": share, "attempt": attempt, "plan": [asdict(phase) for phase in plan]}
        _post(folder / "plan", said)
        return Offer(folder, share, attempt, tuple(plan))

    def offers(self) -> Iterator[Offer]:
        """What is offered, and has phases that nobody has taken."""
        for file in sorted(self.folder.glob("*/plan")):
            if self.has_ended(int(file.parent.name.partition("-")[0])):
                continue
            try:
                said = _read(file)
            except FileNotFoundError:  # it has just been withdrawn
                continue
            plan = tuple(_phase(phase) for phase in said["plan"])
            offer = Offer(file.parent, said["share"], said["attempt"], plan)
            if offer.has_more:
                yield offer


def _phase(said: dict[str, Any]) -> Phase:
    return Phase(tuple(said["members"]), tuple(said["steps"]), tuple(said["active"]), said["enters"])


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
