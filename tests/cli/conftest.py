"""The checkpoint that commands are given, which nobody changes."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny one; a test that damages it copies it."""
    return checkpoints.make("tiny", tmp_path_factory.mktemp("models"))
