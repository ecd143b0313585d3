"""The program that compares variants: where an edit's errors lie."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kvinv_pl.menagerie.case import Case


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    return importlib.import_module("bench_variants")


def test_an_error_is_near_the_animals_or_away_from_them(program: Any) -> None:
    case = Case.of_seed(900_200)
    truth, source = (np.array(case.animal.render(action)) for action in (case.target, None))
    animals = [np.array(case.animal.mask(action)) > 0 for action in (case.target, case.animal.action)]
    moved = np.any(truth != source, axis=2) & ~animals[0] & ~animals[1]  # a shadow
    top = np.zeros_like(moved)
    top[0, 0] = True
    assert moved.any() and not animals[0][0, 0]
    for where, share in ((top, 0.0), (moved, 100.0), (top | moved, 100 * moved.sum() / (1 + moved.sum()))):
        wrong = truth.copy()
        wrong[where] = truth[where] ^ 8  # everywhere by the same amount
        near, far = program.near_and_far(case, Image.fromarray(wrong))
        assert near == pytest.approx(share)
        assert (far == pytest.approx(100)) == (where is moved)
