"""A picture and its tuned run, which the ways in compare with what they make."""

from __future__ import annotations

from pathlib import Path

import fits
import pytest

from kvinv_pl.data.runs.run_store import RunStore


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture whose size the model does not divide."""
    return fits.picture(tmp_path_factory.mktemp("pictures") / "My cat!.png", (45, 30))


@pytest.fixture(scope="session")
def tuned(image: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """The picture as the trainer tunes it."""
    return fits.fit(image, tmp_path_factory.mktemp("tuned") / "run")
