"""The program that tunes psi on moved views of the source, or on the truth."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from kvinv_pl.menagerie.case import Case


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    return importlib.import_module("tuning_on_views")


def test_views_are_moved_as_they_say(program: Any) -> None:
    moved, x = program.moved, torch.rand(2, 3, 8, 8)
    assert torch.allclose(moved(x), x, atol=1e-5)
    assert torch.allclose(moved(x, mirror=1), x.flip(3), atol=1e-5)
    assert torch.allclose(moved(x, right=0.5)[..., :-2], x[..., 2:], atol=1e-5)  # a quarter of the side
    assert torch.allclose(moved(x, down=0.5)[..., :-2, :], x[..., 2:, :], atol=1e-5)
    assert torch.allclose(moved(x, turn=90), x.rot90(1, (2, 3)), atol=1e-5)


@pytest.mark.slow
def test_tuned_on_the_truth_an_edit_is_nearer_to_it(program: Any) -> None:
    case = Case.of_seed(930_003)
    trial = program.Trial([case])
    alone, told = (case.score(trial.edits(kind, 3)[0])["frame dB"] for kind in ("", "truth"))
    assert told > alone
