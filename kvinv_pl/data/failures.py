"""Pictures that could not be worked on: one among many does not stop the rest, and is reported at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.errors import SomeFailedError, StopError, UserError

MEMORY = "take a smaller picture, --trainer.precision bf16-mixed, or --model.slots 1"
"""What to do where memory does not suffice."""


def reason(error: BaseException) -> str:
    """What a picture's failure is called: of one that found no memory, what to do about it, too."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory ({str(error).partition('. ')[0]}): {MEMORY}"
    return str(error)


class Failures:
    """Why pictures of a command failed, by the picture. Of a picture that is alone, it is raised."""

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
        """This picture is given up; raises UserError where it is the only one."""
        if self.total == 1:
            raise UserError(reason)
        self.reasons.setdefault(label, " ".join(reason.split()))

    @contextmanager
    def of(self, works: Iterable[SourceImage]) -> Iterator[None]:
        """Where something goes wrong inside, give these pictures up; a StopError is no matter of theirs."""
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
        said = set(self.reasons.values())
        if len(said) == 1:  # what is wrong is not the pictures
            raise UserError(said.pop())
        listed = "; ".join(f"{label}: {reason}" for label, reason in list(self.reasons.items())[:3])
        more = f"; and {len(self.reasons) - 3} more" if len(self.reasons) > 3 else ""
        raise UserError(f"none of {self.total} pictures could be worked on: {listed}{more}")
