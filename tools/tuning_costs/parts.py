"""Where the seconds of a fit go: the parts of it, each without those that it is part of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from kvinv_pl.data.run_store import RunStore
from kvinv_pl.models.feature_cache import FeatureCache
from kvinv_pl.models.stable_diffusion import Backbone
from kvinv_pl.stages.certificate import Attempt
from kvinv_pl.stages.tune import Tuning
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.trainer import KVTrainer
from tuning_costs.runs import picture

REST = "Lightning, the loss, and all else"
PARTS: dict[str, tuple[type, str]] = {
    "inner steps: forward": (Backbone, "eps"),
    "inner steps: backward": (KVInversion, "manual_backward"),
    "inner steps: optimiser": (torch.optim.Adam, "step"),
    "the step of Eq. 4, with psi as it is stored": (Tuning, "_advance"),
    "writing": (RunStore, "save_step"),
    "certificate": (Attempt, "certify"),
}
"""What is timed under which name; within one, no other is."""


AS_FIRST_BUILT, DEFAULT = "as first built", "by default"
WAYS: dict[str, dict[str, Any]] = {
    AS_FIRST_BUILT: {"optimizer": partial(torch.optim.Adam, lr=1e-2), "inner_steps": 10},
    DEFAULT: {},
}
"""Arguments of KVInversion; as first built, every forward is computed as a whole, too."""


def seconds_of_parts(checkpoint: str, seed: int, way: str, folder: Path, steps: int) -> dict[str, float]:
    """Seconds of every part of tuning an animal that is inverted already, and of the rest."""
    image, source = picture(folder, seed)
    module = KVInversion(checkpoint, steps=steps, retries=0, **WAYS[way])
    trainer = KVTrainer(accelerator="auto", logger=False, quiet=True)
    data = SourceImages(str(image), source, out=str(folder / f"{seed}-{way}"))
    trainer.invert(module, data)
    spent = dict.fromkeys(PARTS, 0.0)
    whole_forwards = patch.object(FeatureCache, "kept", lambda self: nullcontext())
    with whole_forwards if way == AS_FIRST_BUILT else nullcontext(), _timed(spent):
        began = _now()
        trainer.fit(module, datamodule=data)
        whole = _now() - began
    return {**spent, REST: whole - sum(spent.values())}


@contextmanager
def _timed(spent: dict[str, float]) -> Iterator[None]:
    """Add up what the parts take, the outermost of those that are at work at a time."""
    busy: list[str] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if busy:
                return function(*args, **kwargs)
            busy.append(name)
            began = _now()
            try:
                return function(*args, **kwargs)
            finally:
                spent[busy.pop()] += _now() - began

        return call

    with ExitStack() as patched:
        for name, (owner, method) in PARTS.items():
            patched.enter_context(patch.object(owner, method, timed(name, getattr(owner, method))))
        yield


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
