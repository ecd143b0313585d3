"""What a fit takes beside its networks, by a clock around them."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import kvinv_pl
from tuning_costs.models import pipeline

FORWARD, BACKWARD, OTHERS = "U-Net, forward", "U-Net, backward", "VAE and text model"
EVERY_STEP = {"tolerance": 0.0, "tolerance_growth": 0.0, "retries": 0, "required_psnr": 0.0}


@dataclass
class Clock:
    """Seconds in each part, none of which is inside another."""

    now: Callable[[], float] = time.perf_counter
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def around(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same work, timed; a GPU has done it, too."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            try:
                return work(*args, **kwargs)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.seconds[part] += self.now() - began

        return timed


@dataclass(frozen=True)
class Fit:
    """Where the seconds of a fit went."""

    whole: float
    parts: defaultdict[str, float]

    @property
    def rest(self) -> float:
        """Seconds outside the networks."""
        return self.whole - sum(self.parts.values())

    @property
    def share(self) -> float:
        """Of the whole, outside the networks."""
        return self.rest / self.whole


def fits(geometry: str, pixels: int, steps: int, rounds: int, accelerator: str) -> list[Fit]:
    """Fits of one picture by a model of random weights, after one that is not counted.

    Args:
        geometry: Of the model.
        pixels: A side of the picture.
        steps: DDIM steps; every one has all of its inner steps.
        rounds: How many fits.
        accelerator: cpu or gpu.
    """
    settings: dict[str, Any] = {"steps": steps, **EVERY_STEP}
    kv = kvinv_pl.load(pipeline(geometry), accelerator=accelerator, precision="32-true", **settings)
    backbone: Any = kv.model.load_backbone(torch.float32)
    clock, module = Clock(), kv.model
    backbone.predict = clock.around(FORWARD, backbone.predict)
    module.manual_backward = clock.around(BACKWARD, module.manual_backward)
    for name in ("encode", "decode", "embed"):
        setattr(backbone, name, clock.around(OTHERS, getattr(backbone, name)))
    picture = Image.effect_noise((pixels, pixels), 60).convert("RGB")
    found = list[Fit]()
    with tempfile.TemporaryDirectory(prefix="kvinv-") as folder:
        for n in range(rounds + 1):
            clock.seconds.clear()
            began = clock.now()
            kv.tune(picture, "a photograph", Path(folder, str(n)), size=pixels)
            found.append(Fit(clock.now() - began, clock.seconds.copy()))
    return found[1:]
