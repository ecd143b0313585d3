"""Failed pictures: one among many does not stop the others, and is reported at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.errors import SomeFailedError, StopError, UserError

MEMORY = "take a smaller picture, --trainer.precision bf16-mixed, or --model.slots 1"
"""Advice for running out of memory."""


def reason(error: BaseException) -> str:
    """The message for a failed picture, with advice if it ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory ({str(error).partition('. ')[0]}): {MEMORY}"
    return str(error)


class Failures:
    """Why pictures of a command failed, by their labels. The failure of a single picture is raised."""

    def __init__(self, total: int = 1) -> None:
        self.total = total
        self.reasons: dict[str, str] = {}

    def __contains__(self, work: SourceImage) -> bool:
        """Whether this picture has failed."""
        return work.label in self.reasons

    def left(self, works: Iterable[SourceImage]) -> list[SourceImage]:
        """Those that have not failed, in their order."""
        return [work for work in works if work not in self]

    def note(self, label: str, reason: str) -> None:
        """Mark a picture as failed; raises UserError if it is the only one."""
        if self.total == 1:
            raise UserError(reason)
        self.reasons.setdefault(label, " ".join(reason.split()))

    @contextmanager
    def of(self, works: Iterable[SourceImage]) -> Iterator[None]:
        """Mark these pictures as failed on an error inside; re-raise StopError."""
        works = list(works)
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            if self.total == 1:
                raise
            for work in works:
                self.note(work.label, reason(error))
        except UserError as error:
            if self.total == 1 or isinstance(error, StopError):
                raise
            for work in works:
                self.note(work.label, str(error))

    def report(self) -> None:
        """Raise SomeFailedError where some have failed, and where all have, a UserError of one line."""
        if len(self.reasons) < self.total or not self.reasons:
            if self.reasons:
                raise SomeFailedError(self.reasons, self.total)
            return
        reasons = set(self.reasons.values())
        if len(reasons) == 1:  # not the fault of the pictures
            raise UserError(reasons.pop())
        listed = "; ".join(f"{label}: {reason}" for label, reason in list(self.reasons.items())[:3])
        more = f"; and {len(self.reasons) - 3} more" if len(self.reasons) > 3 else ""
        raise UserError(f"all {self.total} pictures failed: {listed}{more}")
