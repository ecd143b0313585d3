"""Every registered variant conforms, by being registered."""

from __future__ import annotations

import pytest

from kvinv_pl.registry import resolve, variants
from kvinv_pl.testing import Trial, trials

EVERY = [(name, trial) for name in variants() for trial in trials(resolve(name))]


@pytest.mark.parametrize(
    "trial", [trial for _, trial in EVERY], ids=[f"{name}: {trial}" for name, trial in EVERY]
)
def test_a_registered_variant_conforms(trial: Trial) -> None:
    trial()
