"""How many stripes or spots are seen on a trunk."""

import math

import numpy as np

from kvinv_pl.menagerie.analysis.regions import areas
from kvinv_pl.menagerie.analysis.truth import BODY, SECOND, Truth

BINS = 64  # of a profile along the trunk, to the picture's side
# of the strongest: a stripe begins over the one and ends under the other
SEEN, CLEAR, HINTED = (0.5, 0.4), (0.65, 0.4), (0.35, 0.3)
STRONG, FAINTEST = 0.9, 0.35  # the strongest is this quantile of the profile, and at least so strong
SPOT = 0.4  # how far towards the second colour the pixels of a spot are
WHOLE = 0.30  # of a mark's size that must be seen for it to be counted
FADED = 0.5  # of its size that the largest mark has at least
SURE, DOUBTFUL = 0.60, 0.12  # of which a mark of the true picture must, or may, be counted


def _stripes(truth: Truth, second: np.ndarray, trunk: np.ndarray, edges: tuple[float, float]) -> np.ndarray:
    """How many pixels of the second colour each stripe has."""
    place = np.floor(truth.along_trunk[trunk] * BINS).astype(int)
    place -= place.min()
    inside, total = np.bincount(place), np.bincount(place, second[trunk])
    shares = total / np.maximum(inside, 1)
    strongest = max(FAINTEST, np.quantile(shares, STRONG))
    rise, fall = edges
    sizes: list[float] = []
    within = False
    for mass, share in zip(total, shares / strongest, strict=True):
        if share > rise and not within:
            sizes.append(0.0)
        within = share > (fall if within else rise)
        if within:
            sizes[-1] += mass
    return np.array(sizes)


def _sizes(truth: Truth, second: np.ndarray, edges: tuple[float, float] = SEEN) -> np.ndarray:
    trunk = (truth.parts["marks"] | truth.parts["body"]) & ~np.isnan(truth.along_trunk)
    if truth.animal.coat == "striped":
        return _stripes(truth, second, trunk, edges)
    return areas(trunk & (second > SPOT))


def _whole(truth: Truth, true: np.ndarray) -> float:
    """The size of a mark that nothing hides."""
    if truth.animal.coat == "striped":
        return float(true.max(initial=1.0))
    radius = float(np.mean([spot[2] for spot in truth.animal.spots])) * truth.animal.scale * truth.size
    return math.pi * radius**2


def count_marks(truth: Truth, distances: np.ndarray) -> tuple[int, int, int]:
    """Marks seen in a picture, and how many the true one has: at least, at most (some are half hidden)."""
    if truth.animal.coat == "plain":
        return 0, 0, 0
    marks = truth.parts["marks"].astype(np.float32)
    towards_second = distances[BODY] / (distances[BODY] + distances[SECOND] + 1e-6)  # 0 in the body's colour
    true, shown = _sizes(truth, marks), _sizes(truth, towards_second)
    whole = _whole(truth, true)
    bar = whole
    if truth.animal.coat == "striped":  # all of them may be fainter than the true ones
        bar = float(np.clip(shown.max(initial=0.0), FADED * whole, whole))
    counts = [
        int((sizes >= share * size).sum())
        for sizes, share, size in (
            (shown, WHOLE, bar),
            (_sizes(truth, marks, CLEAR), SURE, whole),
            (true, DOUBTFUL, whole),
            (_sizes(truth, marks, HINTED), DOUBTFUL, whole),
        )
    ]
    return counts[0], min(counts[1:]), max(counts[2:])
