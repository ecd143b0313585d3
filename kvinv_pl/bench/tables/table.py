"""What a bench found, as tables: means with their intervals, and differences of the same cases."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from kvinv_pl.bench.tables.columns import CAPPED, EXACT, MEANINGS, format_value, is_psnr
from kvinv_pl.menagerie.bootstrap import bootstrap_interval

Scores = Mapping[str, Mapping[str, float]]
"""Of one row: every case's figures, by case and column; NaN where a case has nothing to judge."""
Among = Callable[[str], bool]
"""Which cases are counted, by their names."""


def every(case: str) -> bool:
    """All cases."""
    return True


@dataclass(frozen=True)
class Mean:
    """The mean of what is known, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        """Of independent values; NaN among them are left out."""
        known = np.asarray(list(values), float)
        known = known[~np.isnan(known)]
        low, high = bootstrap_interval(known)
        return cls(float(known.mean()) if len(known) else math.nan, low, high, len(known))

    def __str__(self) -> str:
        """As in a table: empty where nothing is known, and without an interval where there is one value."""
        return self.format("")

    def format(self, name: str) -> str:
        """The same of a column, whose PSNR may be exact."""
        if not self.count:
            return ""
        value, low, high = (format_value(name, each) for each in (self.value, self.low, self.high))
        return value if self.count == 1 or value == "exact" else f"{value} [{low}, {high}]"


def markdown(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table; a "|" in a cell would end it."""
    rows = [[str(cell).replace("|", "\\|") for cell in line] for line in [["", *head], *lines]]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def to_csv(lines: Iterable[Sequence[object]]) -> str:
    """The text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


@dataclass
class Report:
    """Rows of scores, and which cases of a row failed."""

    rows: Mapping[str, Scores]
    columns: Sequence[str]
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Of the cases, in the order in which kinds are shown."""
    ours: str | None = None
    """The row that the others are compared with."""
    failed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    unmeasured: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)
    """By row, case and column, why there is no figure of a case that did not fail."""
    earlier: Sequence[str] = ()
    """Rows that were not asked for now, and are there from before."""

    def mean(self, row: str, column: str, among: Among = every) -> Mean:
        """Over the cases of a row."""
        scores = self.rows[row]
        return Mean.of(metrics.get(column, math.nan) for case, metrics in scores.items() if among(case))

    def difference(self, row: str, column: str, other: str | None = None) -> Mean:
        """A row's figures less those of another (None: ours), case by case."""
        a, b = self.rows[row], self.rows[other or self.ours or ""]
        return Mean.of(
            a[case].get(column, math.nan) - b[case].get(column, math.nan) for case in a if case in b
        )

    @cached_property
    def known_columns(self) -> list[str]:
        """The columns in which any row has a value, or should have one."""
        measured = {
            name
            for scores in self.rows.values()
            for metrics in scores.values()
            for name, value in metrics.items()
            if not math.isnan(value)
        }
        return [
            name
            for name in self.columns
            if name in measured or any(self.count_unmeasured(row, name) for row in self.rows)
        ]

    def count_unmeasured(self, row: str, column: str, among: Among = every) -> int:
        """How many cases of a row lack this figure because its metric failed."""
        return sum(column in why and among(case) for case, why in self.unmeasured.get(row, {}).items())

    @property
    def notes(self) -> list[str]:
        """What the columns say, a line each, and what exact is where it stands."""
        found = [f"{name}: {MEANINGS[name]}" for name in self.known_columns if name in MEANINGS]
        metrics = [each for scores in self.rows.values() for each in scores.values()]
        capped = any(is_psnr(name) and each[name] >= CAPPED for each in metrics for name in each)
        return [*found, EXACT] if capped else found

    @property
    def failures(self) -> dict[str, str]:
        """Why, by row and case: what was not computed, and what was not measured."""
        found = {f"{row}, {case}": why for row, cases in self.failed.items() for case, why in cases.items()}
        for row, cases in self.unmeasured.items():
            for case, reasons in cases.items():
                names = {why: [name for name in reasons if reasons[name] == why] for why in reasons.values()}
                if names:
                    parts = (f"{', '.join(names[why])} not measured: {why}" for why in names)
                    found[f"{row}, {case}"] = "; ".join(parts)
        return found

    @property
    def failures_now(self) -> dict[str, str]:
        """The failures of the rows that were asked for now."""
        failed, unmeasured = (
            {row: cases for row, cases in found.items() if row not in self.earlier}
            for found in (self.failed, self.unmeasured)
        )
        return replace(self, failed=failed, unmeasured=unmeasured).failures

    def markdown(self) -> str:
        """All tables, each under its heading."""
        parts = ["## All cases\n\n" + self._means(every)]
        kinds = list(dict.fromkeys(self.kinds.values()))
        for kind in kinds if len(kinds) > 1 else ():
            parts.append(f"## {kind}\n\n" + self._means(lambda case, kind=kind: self.kinds[case] == kind))
        if self.ours in self.rows and len(self.rows) > 1:
            names, others = self.known_columns, [row for row in self.rows if row != self.ours]
            lines = [[row, *(self.difference(row, name) for name in names)] for row in others]
            parts.append(f"## Less {self.ours}, case by case\n\n{markdown(names, lines)}")
        if reasons := [f"* {which}: {why}" for which, why in self.failures.items()]:
            parts.append("## Failed\n\n" + "\n".join(reasons))
        if notes := self.notes:
            parts.append("## What the columns say\n\n" + "\n".join(f"* {note}" for note in notes))
        return "\n\n".join(parts) + "\n"

    def _means(self, among: Among) -> str:
        lines: list[list[object]] = []
        for row, scores in self.rows.items():
            count, failed = sum(map(among, scores)), sum(map(among, self.failed.get(row, ())))
            cases = f"{count} ({failed} failed)" if failed else str(count)
            lines.append([row, cases, *(self._cell(row, name, among) for name in self.known_columns)])
        return markdown(["cases", *self.known_columns], lines)

    def _cell(self, row: str, column: str, among: Among) -> str:
        mean, lost = self.mean(row, column, among).format(column), self.count_unmeasured(row, column, among)
        return f"{mean} ({lost} not measured)".strip() if lost else mean

    def csv(self) -> str:
        """One line for each row, case and column."""
        lines: list[list[object]] = [["row", "case", "kind", "figure", "value"]]
        for row, scores in self.rows.items():
            for case, metrics in scores.items():
                for name in self.known_columns:
                    value = metrics.get(name, math.nan)
                    kind, shown = self.kinds.get(case, ""), "" if math.isnan(value) else value
                    lines.append([row, case, kind, name, shown])
        return to_csv(lines)

    def json(self) -> str:
        """Means, differences, figures and failures; what is not known is null."""

        def plain(mean: Mean) -> dict[str, float | int | None]:
            values = {"mean": mean.value, "low": mean.low, "high": mean.high}
            return {**{key: known(value) for key, value in values.items()}, "count": mean.count}

        def known(value: float) -> float | None:
            return value if math.isfinite(value) else None

        rows = {}
        for row, scores in self.rows.items():
            rows[row] = {
                "means": {name: plain(self.mean(row, name)) for name in self.known_columns},
                "cases": {
                    case: {name: known(value) for name, value in metrics.items()}
                    for case, metrics in scores.items()
                },
                "failed": dict(self.failed.get(row, {})),
                "not measured": {
                    case: dict(why) for case, why in self.unmeasured.get(row, {}).items() if why
                },
            }
            if self.ours in self.rows and row != self.ours:
                rows[row]["less ours"] = {
                    name: plain(self.difference(row, name)) for name in self.known_columns
                }
        return json.dumps({"ours": self.ours, "kinds": dict(self.kinds), "rows": rows}, indent=1) + "\n"
