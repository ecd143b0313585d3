"""Cases: a picture, its prompts, where it may be edited; and those of the drawn world, which have a truth."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

from kvinv_pl.data.failures import reason
from kvinv_pl.errors import StopError, UserError
from kvinv_pl.menagerie.case import Case as Drawn

SOURCE, THROUGH_VAE = "source", "through the VAE"


def is_reference(row: str) -> bool:
    """Whether it is one of the rows that no method makes."""
    return row == SOURCE or row.endswith(THROUGH_VAE)


class Case(Protocol):
    """One picture that is edited once by every row."""

    @property
    def name(self) -> str:
        """In tables and file names."""
        ...

    @property
    def kind(self) -> str:
        """The group that it is counted in."""
        ...

    @property
    def source(self) -> str:
        """What it shows."""
        ...

    @property
    def target(self) -> str:
        """What it should become."""
        ...

    @property
    def editable(self) -> np.ndarray | None:
        """Where it may change, boolean (height, width); None: that is not known."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of picture, prompts and masks, if these may change under the name; else empty."""
        ...

    @property
    def mask(self) -> np.ndarray | None:
        """Where the subject is, like `editable`, for methods that are given a mask."""
        ...

    def picture(self) -> Image.Image:
        """The source."""
        ...


@dataclass(frozen=True)
class Metric:
    """Figures of an edited picture, with NaN where a case has nothing to judge."""

    name: str
    columns: Sequence[str]
    measure: Callable[[Case, Image.Image], Mapping[str, float]]
    model: str = ""
    """Whose figures they are: a bench is not gone on with by another."""


def measure(
    metrics: Sequence[Metric], case: Case, opened: Callable[[], Image.Image]
) -> tuple[dict[str, float], dict[str, str]]:
    """The figures of an edited picture, by column; and why there are none, where a metric raised anything."""
    found, unmeasured = dict[str, float](), dict[str, str]()
    for metric in metrics:
        try:
            found |= metric.measure(case, opened())
        except StopError:
            raise
        except Exception as error:
            unmeasured |= dict.fromkeys(metric.columns, error_text(error))
    return found, unmeasured


def error_text(error: Exception) -> str:
    """Why something failed, in one line; of an error that nobody foresaw, with its kind."""
    known = isinstance(error, UserError | MemoryError)
    return " ".join((reason(error) if known else f"{type(error).__name__}: {reason(error)}").split())


@dataclass(frozen=True)
class Cases:
    """The cases of a bench, in their order; how they are measured; and rows that no method makes."""

    title: str
    cases: Sequence[Case]
    metrics: Sequence[Metric]
    references: Mapping[str, Callable[[Case], Image.Image]] = field(default_factory=dict)
    """By the row's name; what ends in "through the VAE" goes through it."""

    def first(self, count: int | None) -> Sequence[Case]:
        """The first so many; None: all."""
        return self.cases if count is None else self.cases[:count]


@dataclass(frozen=True)
class DrawnCase:
    """A case of the drawn world, in the size of a model's pictures."""

    drawn: Drawn
    size: int
    kind: str = ""

    @property
    def name(self) -> str:
        """The seed."""
        return str(self.drawn.animal.seed)

    @property
    def source(self) -> str:
        """The animal's prompt in its own action."""
        return self.drawn.animal.prompt()

    @property
    def target(self) -> str:
        """Its prompt in the target action."""
        return self.drawn.animal.prompt(self.drawn.target)

    @property
    def editable(self) -> np.ndarray | None:
        """Where the animal is or should be."""
        return np.logical_or(*self.drawn.animals(self.size))

    @property
    def fingerprint(self) -> str:
        """Nothing: the seed says all."""
        return ""

    @property
    def mask(self) -> np.ndarray:
        """Where the animal is in its own action."""
        return self.drawn.animals(self.size)[1]

    def picture(self) -> Image.Image:
        """The animal as it is."""
        return self.drawn.animal.render(size=self.size)

    def truth(self) -> Image.Image:
        """The animal as it should be."""
        return self.drawn.animal.render(self.drawn.target, self.size)

    def another(self) -> Image.Image:
        """Another animal of the very same words, in the scene and action that this one should be in."""
        return self.drawn.animal.another(same_scene=True).render(self.drawn.target, self.size)


IDENTITY = Metric(
    "drawn",
    (
        *("same animal %", "right action %", "named right %", "second recall", "second precision"),
        *("accent %", "body", "marks %", "scene %", "frame dB", "animal dB", "background dB"),
    ),
    lambda case, picture: _drawn(case).drawn.score(picture),
)
"""A picture of the drawn world against what was drawn."""


def drawn_world(size: tuple[int, int], count: int, seed_base: int, metrics: Sequence[Metric] = ()) -> Cases:
    """The cases of the seeds from `seed_base` on, in the (height, width) of a model's pictures."""
    if count < 1 or seed_base < 0:
        raise UserError(f"cases and seed_base: expected 1 or more and 0 or more, got {count} and {seed_base}")
    if size[0] != size[1]:
        raise UserError(f"the drawn world's pictures are square, and the model's are {size[1]} x {size[0]}")
    cases = [DrawnCase(Drawn.of_seed(seed), size[0]) for seed in range(seed_base, seed_base + count)]
    references: dict[str, Callable[[Case], Image.Image]] = {
        SOURCE: lambda case: case.picture(),
        f"truth {THROUGH_VAE}": lambda case: _drawn(case).truth(),
        f"another animal of the same words, {THROUGH_VAE}": lambda case: _drawn(case).another(),
    }
    return Cases(f"the drawn world, {size[1]} x {size[0]} pixels", cases, [IDENTITY, *metrics], references)


def _drawn(case: Case) -> DrawnCase:
    assert isinstance(case, DrawnCase)
    return case
