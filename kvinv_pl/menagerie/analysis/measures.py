"""Single figures of a picture against what was drawn; `identity` puts them together."""

import math

import numpy as np

from kvinv_pl.menagerie.analysis.regions import grown, shifts
from kvinv_pl.menagerie.analysis.truth import NEAR, SECOND, Truth

# shares of the side
BESIDE = 1 / 64  # how far beside its true place the second colour is still at it
FEW = 4 / 64  # a square of this side has too few pixels of the second colour for recall and precision
SMALL = 3 / 64  # and one of this side too few of a part of the scene
WINDOW = 8 / 64  # over which the scene is compared


def colour_error(truth: Truth, rgb: np.ndarray, region: np.ndarray) -> float:
    """The error of a region's median colour."""
    inner = truth.inner(region)
    if not inner.any():
        return math.nan
    return _error(rgb[inner], np.median(truth.picture[inner], 0))


def thin_colour_error(truth: Truth, rgb: np.ndarray, region: np.ndarray, animal: np.ndarray) -> float:
    """The same where a region is thin: the least within a small shift that stays on the animal.

    Of its pixels on the animal the half that is nearest to the true colour counts: a decoder mixes the others
    with what is beside them.
    """
    inner = truth.inner(region)
    if not inner.any():
        return math.nan
    true = np.median(truth.picture[inner], 0)
    on_animal = truth.own_animal[inner].mean() / 2
    (rows, columns), last = np.nonzero(inner), truth.size - 1
    errors: list[float] = []
    for dx, dy in shifts(round(truth.pixels(NEAR))):
        shifted = np.clip(rows + dy, 0, last), np.clip(columns + dx, 0, last)
        if not errors or animal[shifted].mean() >= on_animal:  # the first is no shift
            inside = truth.silhouette[shifted]  # what is seen of a pale collar may look like snow
            shown = rgb[shifted][inside] if inside.any() else rgb[shifted]
            off = np.abs(shown - true).mean(-1)
            errors.append(_error(shown[off <= np.median(off)], true))
    return min(errors)


def _error(colours: np.ndarray, true: np.ndarray) -> float:
    return float(np.abs(np.median(colours, 0) - true).mean())


def _beyond_chance(part: np.ndarray, whole: np.ndarray, near: np.ndarray) -> float:
    """How much of a part is near something: 0 where that is no more than of the whole, 1 for all."""
    hit, chance = near[part].mean(), near[whole].mean()
    return float(max((hit - chance) / max(1 - chance, 0.05), -1.0))


def second_recall_precision(truth: Truth, second: np.ndarray) -> tuple[float, float]:
    """Recall and precision of the second colour beyond chance."""
    of_truth = truth.own_labels == SECOND
    true, near = truth.coloured & of_truth, truth.pixels(BESIDE)
    if not truth.enough(true, FEW):
        recall = math.nan
    else:
        recall = _beyond_chance(true, truth.silhouette, grown(second, near))
    if not truth.enough(second, FEW):
        precision = math.nan
    else:
        # edges that look like the second colour in the true picture may look so in this one
        allowed = truth.coloured | (of_truth & grown(truth.silhouette, truth.pixels(NEAR)))
        precision = _beyond_chance(second, truth.silhouette | second, grown(allowed, near))
    return recall, precision


def accent_elsewhere(truth: Truth, second: np.ndarray) -> float:
    """How much of an accent that this animal does not have is of the second colour, at most."""
    shares = [float(second[region].mean()) for region in truth.other_accents if truth.enough(region, NEAR)]
    return max(shares) if shares else math.nan


def size_and_place(truth: Truth, seen: np.ndarray) -> tuple[float, float]:
    """Errors of the logarithm of the size, and of the middle in shares of the side."""
    true = truth.own_animal
    if not seen.any():
        return math.inf, math.inf
    (y, x), (true_y, true_x) = (np.argwhere(region).mean(0) for region in (seen, true))
    size = abs(math.log(seen.sum() / true.sum())) / 2
    return size, math.hypot(x - true_x, y - true_y) / truth.size


def scene_error(truth: Truth, rgb: np.ndarray, part: str) -> float:
    """The error of one part of the scene, as the mean of the window in which it is worst."""
    region = truth.scene(part)
    if not truth.enough(region, SMALL):
        return math.nan
    error = np.where(region, np.abs(rgb - truth.scenery).mean(-1), 0)
    width = max(1, round(truth.pixels(WINDOW)))
    errors, inside = (_window_sums(plane, width) for plane in (error, region.astype(float)))
    # a window with little of the part is no place of its own, but for a part that is small itself
    full = inside >= min(width * width / 2, inside.max())
    return float((errors[full] / inside[full]).max())


def _window_sums(plane: np.ndarray, width: int) -> np.ndarray:
    """Sums over every square window of the plane."""
    sums = np.pad(plane, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    return sums[width:, width:] - sums[:-width, width:] - sums[width:, :-width] + sums[:-width, :-width]
