"""What the benches of edits print: the figures of one way of editing, and the table of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from kvinv_pl.bench.benchmarks.cases import IDENTITY
from kvinv_pl.bench.tables.table import Mean, markdown
from kvinv_pl.menagerie.case import Case

COLUMNS = (*IDENTITY.columns, "reconstruction dB", "tune s", "edit s")


@dataclass
class Row:
    """One way of editing: its pictures, one a case, and what else is known of it, of each case or of all."""

    name: str
    pictures: list[Image.Image]
    extra: dict[str, Any] = field(default_factory=dict)

    def figures(self, cases: Sequence[Case]) -> dict[str, np.ndarray]:
        """Every column's values, one a case; NaN where a case has nothing to judge."""
        scores = [case.score(picture) for case, picture in zip(cases, self.pictures, strict=True)]
        figures = {key: np.array([score[key] for score in scores]) for key in scores[0]}
        return figures | {key: np.atleast_1d(value) for key, value in self.extra.items()}


def table(rows: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """The figures of named rows as a Markdown table."""
    lines = [
        [name, *(Mean.of(figures[column]) if column in figures else "" for column in COLUMNS)]
        for name, figures in rows.items()
    ]
    return markdown(COLUMNS, lines)
