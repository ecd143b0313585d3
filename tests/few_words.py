"""The vocabulary of the drawn world, learned from few of its scenes, each of them often."""

from __future__ import annotations

import importlib
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

DISTINCT = 150
"""Every word occurs in so many scenes of a kind."""


def learn_words() -> None:
    """Learn the tokenizer of the training, which a process makes once: nearly all its time is for scenes."""
    denoiser: Any = importlib.import_module("menagerie_training.denoiser")

    def few(kind: Any) -> Any:
        sample = cache(kind.sample)
        return SimpleNamespace(sample=lambda seed: sample(seed % DISTINCT))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("Animal", "Twice"):
            patch.setattr(denoiser, name, few(getattr(denoiser, name)))
        denoiser.build_tokenizer()
