"""How sure a mean is: its bootstrap interval."""

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def bootstrap_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of independent values; NaN among them are left out.

    Of values that are all the same the interval is that value, however few there are. NaN of none.
    """
    known = np.asarray(values, float).ravel()
    known = known[~np.isnan(known)]
    if not len(known):
        return math.nan, math.nan
    picks = np.random.default_rng(0).integers(len(known), size=(RESAMPLES, len(known)))
    low, high = np.quantile(known[picks].mean(1), (0.025, 0.975))
    return float(low), float(high)
