"""Whether metrics without a truth order edits as the truth does: Spearman's rank correlation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from kvinv_pl.bench.table import Report, markdown

TRUTH = ("same animal %", "right action %")
METRICS: Mapping[str, int] = {
    "PIE structure x10^3": -1, "PIE PSNR": 1, "PIE MSE x10^4": -1, "PIE SSIM x10^2": 1,
    "CLIP whole": 1, "CLIP edited": 1,
}  # fmt: skip
"""Those of PIE-Bench, and whether more is better."""
RESAMPLES = 500


def ranks(report: Report) -> str:
    """The table: every metric against the truth, over methods and over edits; empty where there is no truth.

    An edit is right that shows the same animal in the right action. 1: a metric orders as the truth does; 0:
    as chance; below 0: the other way round. Intervals are of resampled cases.
    """
    rows = [scores for scores in report.rows.values() if scores]
    if not set(TRUTH) <= set(report.known) or len(rows) < 3:
        return ""
    cases = [case for case in report.kinds if all(case in scores for scores in rows)]

    def values(name: str) -> np.ndarray:
        return np.array([[scores[case].get(name, math.nan) for case in cases] for scores in rows])

    right = np.minimum(*(values(name) for name in TRUTH)) > 50
    lines = []
    for name, sign in METRICS.items():
        metric = sign * values(name)
        metric, true = (each[:, ~np.isnan(metric).any(0)] for each in (metric, right.astype(float)))
        if metric.size:
            lines.append([name, *_with_intervals(true, metric)])
    return markdown(["over methods", "over edits"], lines) if lines else ""


def _with_intervals(truth: np.ndarray, metric: np.ndarray) -> list[str]:
    """Of means of rows, and of all values; (rows, cases)."""
    count = truth.shape[1]
    picks = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    found = []
    for reduce in (lambda x: x.mean(1), np.ravel):
        value = spearman(reduce(truth), reduce(metric))
        drawn = [spearman(reduce(truth[:, pick]), reduce(metric[:, pick])) for pick in picks]
        drawn = [each for each in drawn if not math.isnan(each)]
        low, high = np.quantile(drawn, (0.025, 0.975)) if drawn else (math.nan, math.nan)
        found.append("" if math.isnan(value) else f"{value:.2f} [{low:.2f}, {high:.2f}]")
    return found


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
