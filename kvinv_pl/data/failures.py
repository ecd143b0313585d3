"""Failed pictures: one among many does not stop the others, and is reported at the end."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.errors import SomeFailedError, StopError, UserError

MEMORY_ADVICE = (
    "take a smaller working size such as --data.size 384, --data.geometry crop, fewer layers by "
    "--model.max_grid 32, --model.attention low_rank, --model.kv replayed in tuning, --model.slots 1 or "
    "--trainer.precision bf16-mixed; `kvinv plan` counts what each of them takes"
)
OUT_OF_MEMORY = re.compile(
    r"out of memory|(?:can't allocate|not enough) memory|Invalid buffer size|_STATUS_ALLOC_FAILED", re.I
)
"""How a RuntimeError tells it: MPS, the CPU and the libraries of a GPU have no type of their own for it."""
_SOURCE_LOCATION = re.compile(r"^\[enforce fail at [^]]*\][^.]*\. ")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of any device, or of the machine, was not enough."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


def reason(error: BaseException) -> str:
    """The message for a failed picture, with advice if it ran out of memory."""
    if is_out_of_memory(error):
        detail = _SOURCE_LOCATION.sub("", str(error)).partition(". ")[0].strip()
        return f"out of memory{f' ({detail})' if detail else ''}: {MEMORY_ADVICE}"
    return str(error)


class Failures:
    """Why pictures of a command failed, by their labels. The failure of a single picture is raised."""

    def __init__(self, total: int = 1) -> None:
        self.total = total
        self.reasons: dict[str, str] = {}

    def __contains__(self, image: SourceImage) -> bool:
        """Whether this picture has failed."""
        return image.label in self.reasons

    def remaining(self, images: Iterable[SourceImage]) -> list[SourceImage]:
        """Those that have not failed, in their order."""
        return [image for image in images if image not in self]

    def note(self, label: str, reason: str) -> None:
        """Mark a picture as failed; raises UserError if it is the only one."""
        if self.total == 1:
            raise UserError(reason)
        self.reasons.setdefault(label, " ".join(reason.split()))

    @contextmanager
    def catching(self, images: Iterable[SourceImage]) -> Iterator[None]:
        """Mark these pictures as failed on an error inside; re-raise StopError."""
        images = list(images)
        try:
            yield
        except (UserError, RuntimeError, MemoryError) as error:
            is_of_one = isinstance(error, UserError) and not isinstance(error, StopError) and self.total > 1
            if not (is_of_one or is_out_of_memory(error)):
                raise
            for image in images:
                self.note(image.label, reason(error))

    def raise_failures(self) -> None:
        """Raise SomeFailedError where some have failed, and where all have, a UserError of one line."""
        if not self.reasons:
            return
        if len(self.reasons) < self.total:
            raise SomeFailedError(self.reasons, self.total)
        reasons = set(self.reasons.values())
        if len(reasons) == 1:  # not the fault of the pictures
            raise UserError(reasons.pop())
        listed = "; ".join(f"{label}: {reason}" for label, reason in list(self.reasons.items())[:3])
        more = f"; and {len(self.reasons) - 3} more" if len(self.reasons) > 3 else ""
        raise UserError(f"all {self.total} pictures failed: {listed}{more}")
