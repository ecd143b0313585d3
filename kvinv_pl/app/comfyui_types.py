"""What ComfyUI hands about: its pictures and masks, its inputs, its bar."""

import sys
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kvinv_pl.app.edit_options import EditOption
from kvinv_pl.stages.progress import Progress


def as_picture(image: Float[Tensor, "n h w c"]) -> Image.Image:
    """The first of an IMAGE, a batch in 0..1: a run is of one picture."""
    return _of_bytes(image[0])


def as_mask(mask: Float[Tensor, "*n h w"] | None) -> Image.Image | None:
    """A MASK, 1 on the subject, without its batch or with one; None if nothing is masked.

    Load Image has a small black one for every picture without transparency.
    """
    if mask is None or not bool(mask.any()):
        return None
    return _of_bytes(mask if mask.ndim == 2 else mask[0])


def as_tensor(image: Image.Image) -> Float[Tensor, "1 h w *c"]:
    """A batch of one picture or mask, in 0..1."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() / 255
    size = (1, image.height, image.width)
    return values.view(size if image.mode == "L" else (*size, -1))


def _of_bytes(values: Tensor) -> Image.Image:
    return Image.fromarray((values.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def as_input(option: EditOption) -> tuple[Any, ...]:
    """An option as an input of ComfyUI; what the model decides if it is left empty is a text."""
    attributes: dict[str, Any] = {"tooltip": option.help, "default": option.default}
    if option.kind == "choice":
        return list(option.choices), attributes
    if option.default is None or option.kind == "text":
        return "STRING", {**attributes, "default": option.default or ""}
    if option.kind == "switch":
        return "BOOLEAN", attributes
    low, high = option.range or (0.0, 1e6)
    kind = "INT" if option.kind == "whole number" else "FLOAT"
    return kind, {**attributes, "min": low, "max": high, "step": option.step}


class Bar(Progress):
    """ComfyUI's progress bar and its cancel button, where it is there."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def show(self, detail: str) -> None:
        """Move the bar; raises ComfyUI's own exception if the user has cancelled."""
        comfy: Any = [sys.modules.get(f"comfy.{name}") for name in ("model_management", "utils")]
        if None not in comfy:
            comfy[0].throw_exception_if_processing_interrupted()
            comfy[1].ProgressBar(1000).update_absolute(round(1000 * self.share))
