"""Every registered variant conforms, by being registered."""

from __future__ import annotations

import pytest

from kvinv_pl.attention.registry import variants
from kvinv_pl.testing import Trial, trials

EVERY = [
    (name, trial) for name, variant in variants().items() if variant.cls for trial in trials(variant.cls)
]
ONCE = {"compiles", "every option documented"}
"""Slow, or of the class: with the defaults in `make test`, with every choice in `make test-all`."""


@pytest.mark.parametrize(
    "trial",
    [
        pytest.param(
            trial,
            id=f"{name}: {trial}",
            marks=pytest.mark.slow if trial.options and trial.check.name in ONCE else (),
        )
        for name, trial in EVERY
    ],
)
def test_a_registered_variant_conforms(trial: Trial) -> None:
    trial()


def test_the_shipped_variant_is_among_them() -> None:
    assert "full_kv" in {name for name, _ in EVERY}
