"""tools/scoring.py: a way of editing is measured case by case, and its table says how sure each mean is."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scoring() -> Iterator[Any]:
    path = sys.path.copy()
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("scoring")
    sys.path[:] = path


@pytest.fixture(scope="module")
def cases(scoring: Any) -> list[Any]:
    return [scoring.Case.of_seed(seed) for seed in range(900_000, 900_006)]


def test_the_truth_has_the_best_figures_and_the_source_is_another_animal(
    scoring: Any, cases: list[Any]
) -> None:
    truth = scoring.Row("truth", [case.animal.render(case.target, 64) for case in cases]).figures(cases)
    for column in ("same animal %", "right action %", "accent %", "scene %"):
        assert (truth[column] == 100).all()
    assert np.nanmax(truth["body"]) < 0.01
    plain = [case.animal.coat == "plain" for case in cases]
    assert np.array_equal(np.isnan(truth["marks %"]), plain)
    source = scoring.Row("source", [case.animal.render(size=64) for case in cases]).figures(cases)
    assert (source["same animal %"] == 0).all()
    assert (source["scene %"] == 100).all()


def test_a_table_has_means_with_intervals_and_leaves_empty_what_is_not_known(
    scoring: Any, cases: list[Any]
) -> None:
    pictures = [case.animal.render(case.target, 64) for case in cases]
    row = scoring.Row("truth", pictures, {"reconstruction dB": [40.0, 42.0] * 3, "edit s": 1.5})
    head, _, line = scoring.table({"truth": row.figures(cases)}).splitlines()
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert cells["same animal %"] == "100.00 [100.00, 100.00]"
    assert cells["reconstruction dB"].startswith("41.00 [40.")
    assert cells["tune s"] == ""
    assert line.endswith("1.50 |")
