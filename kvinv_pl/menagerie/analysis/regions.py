"""Regions of a picture as boolean arrays: growing, shifting, connected components, the best small shift."""

from itertools import product

import numpy as np


def grown(region: np.ndarray, radius: float) -> np.ndarray:
    """Every pixel within `radius` pixels of the region."""
    reach = int(radius)
    height, width = region.shape
    padded = np.pad(region, reach)
    out = np.zeros_like(region)
    for dy, dx in product(range(-reach, reach + 1), repeat=2):
        if dx * dx + dy * dy <= radius * radius:
            out |= padded[reach + dy : reach + dy + height, reach + dx : reach + dx + width]
    return out


def core(region: np.ndarray, radius: float, least: int) -> np.ndarray:
    """The region without what lies within `radius` pixels of its edge, or all where that is too little."""
    inner = ~grown(~region, radius)
    return inner if inner.sum() >= least else region


def shifted(plane: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """The plane (h, w) or (h, w, c) moved right by dx and down by dy; what comes in repeats the edge."""
    height, width = plane.shape[:2]
    rows = np.clip(np.arange(height) - dy, 0, height - 1)
    return plane[rows][:, np.clip(np.arange(width) - dx, 0, width - 1)]


def shifts(reach: int) -> list[tuple[int, int]]:
    """Every whole shift within `reach` pixels, the nearest first."""
    near = [(dx, dy) for dx, dy in product(range(-reach, reach + 1), repeat=2) if dx**2 + dy**2 <= reach**2]
    return sorted(near, key=lambda shift: shift[0] ** 2 + shift[1] ** 2)


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union."""
    return float((one & other).sum() / max(1, (one | other).sum()))


def best_shift(region: np.ndarray, onto: np.ndarray, reach: int) -> tuple[int, int]:
    """The shift of at most `reach` pixels that lays the region onto the other best."""
    return max(shifts(reach), key=lambda shift: overlap(shifted(region, *shift), onto))


def areas(region: np.ndarray) -> np.ndarray:
    """How many pixels each connected component (by edges) has, the largest first."""
    label = np.where(region, np.arange(1, region.size + 1).reshape(region.shape), 0)
    while True:  # every pixel takes the greatest label around it, until nothing changes
        p = np.pad(label, 1)
        around = np.max([label, p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]], axis=0) * region
        if np.array_equal(around, label):
            return np.sort(np.unique(label[region], return_counts=True)[1])[::-1]
        label = around
