"""Whether metrics without a truth order edits as the truth does: Spearman's rank correlation."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvinv_pl.bench.benchmarks.cases import is_reference
from kvinv_pl.bench.tables.table import Mean, Report, markdown, to_csv

TRUTH = ("same animal %", "right action %")
METRICS: Mapping[str, int] = {
    "PIE structure x10^3": -1, "PIE PSNR": 1, "PIE MSE x10^4": -1, "PIE SSIM x10^2": 1, "PIE LPIPS x10^3": -1,
    "CLIP whole": 1, "CLIP edited": 1,
}  # fmt: skip
"""Those of PIE-Bench, and whether more is better."""
RESAMPLES = 500
FEWEST = 3  # methods: two are ordered as the truth has them, or not


@dataclass(frozen=True)
class Rank:
    """How well one metric orders as the truth does: 1 as it does, 0 as chance, below 0 the other way round.

    An edit is right that shows the same animal in the right action.
    """

    metric: str
    methods: Mean
    """By the mean of each method; its count is that of the methods."""
    edits: Mean
    """By each edit; its count is that of the edits."""


def ranks(report: Report) -> list[Rank]:
    """Of every metric that is known; none where there is no truth, or fewer than three methods.

    Over the cases that every method has; intervals are of 95 %, of resampled cases. What no method makes,
    such as the source, is left out.
    """
    rows = [scores for name, scores in report.rows.items() if scores and not is_reference(name)]
    if not set(TRUTH) <= set(report.known_columns) or len(rows) < FEWEST:
        return []
    cases = [case for case in report.kinds if all(case in scores for scores in rows)]

    def values(name: str) -> np.ndarray:
        return np.array([[scores[case].get(name, math.nan) for case in cases] for scores in rows])

    truth = np.minimum(*(values(name) for name in TRUTH))  # NaN where either is
    found = []
    for name, sign in METRICS.items():
        metric = sign * values(name)
        known = ~np.isnan(metric + truth).any(0)
        right, metric = (truth[:, known] > 50).astype(float), metric[:, known]
        if metric.size:
            over = (_over(right, metric, reduce) for reduce in (partial(np.mean, axis=1), np.ravel))
            found.append(Rank(name, *over))
    return found


def _over(truth: np.ndarray, metric: np.ndarray, reduce: Callable[[np.ndarray], np.ndarray]) -> Mean:
    """Of what is made of (methods, cases); where the truth or the metric is constant, nothing is known."""
    count = truth.shape[1]
    picks = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    value = spearman(reduce(truth), reduce(metric))
    drawn = [spearman(reduce(truth[:, pick]), reduce(metric[:, pick])) for pick in picks]
    drawn = [each for each in drawn if not math.isnan(each)]
    if math.isnan(value) or not drawn:
        return Mean(math.nan, math.nan, math.nan, 0)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Mean(value, float(low), float(high), len(reduce(truth)))


def as_markdown(found: Sequence[Rank]) -> str:
    """The table."""
    return markdown(
        ["over methods", "over edits"], [[each.metric, each.methods, each.edits] for each in found]
    )


def as_csv(found: Sequence[Rank]) -> str:
    """A line for each metric, over methods and over edits; what is not known is empty."""
    lines: list[list[object]] = [["metric", "over", "count", "rank correlation", "low", "high"]]
    for each in found:
        for over, mean in (("methods", each.methods), ("edits", each.edits)):
            figures = [round(x, 6) for x in (mean.value, mean.low, mean.high)] if mean.count else [""] * 3
            lines.append([each.metric, over, mean.count, *figures])
    return to_csv(lines)


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """The correlation of ranks, ties shared; NaN where either is constant."""
    x, y = _ranks(np.asarray(a, float)), _ranks(np.asarray(b, float))
    if not len(x) or not x.std() or not y.std():
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Of each value its place from the least, and of equal ones the mean of theirs."""
    found, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return ((ends - counts + ends - 1) / 2)[where] if len(found) else values
