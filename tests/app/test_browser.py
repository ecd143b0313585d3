"""The studio, the report and a bench in a real browser, where playwright and a Chromium are there."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))


@pytest.mark.slow  # a browser, and the embedded model
@pytest.mark.skipif(
    not (shutil.which("chromium") or "PLAYWRIGHT_BROWSERS_PATH" in os.environ), reason="no Chromium"
)
def test_everything_that_the_studio_and_the_report_are_for_works_in_a_browser(tmp_path: Path) -> None:
    pytest.importorskip("playwright")
    look = importlib.import_module("look_at_studio")
    with look.looking(tmp_path / "shots", None) as eye:
        look.studio(eye, tmp_path / "runs", checkpoint="menagerie", accelerator="cpu", steps=10, retries=0)
        look.report(eye, tmp_path / "runs")
        look.bench(eye)
    assert len(list((tmp_path / "shots").glob("*.png"))) == 10
