"""Nodes for ComfyUI: load, tune, edit, mask; `comfyui/` in the repository is the folder that it loads."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kvinv_pl.api import KVInverter, Run, load
from kvinv_pl.app import subject
from kvinv_pl.app.studio.dials import Dial, dials, read
from kvinv_pl.attention.registry import variants
from kvinv_pl.stages.progress import Progress

Inputs = dict[str, dict[str, Any]]
PRECISIONS = ["auto", "32-true", "bf16-mixed", "16-mixed"]


class Node:
    """What ComfyUI asks of every node; `run` is called with the inputs by their names."""

    CATEGORY: ClassVar[str] = "KV Inversion"
    FUNCTION: ClassVar[str] = "run"


class LoadModel(Node):
    """A checkpoint with the settings of the tuning."""

    RETURN_TYPES: ClassVar = ("KV_MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """As of `kvinv_pl.load`."""
        return {
            "required": {
                "checkpoint": ("STRING", {"default": "menagerie", "tooltip": "a folder, file or hub id"}),
                "attention": (sorted(variants()), {"default": "full_kv", "tooltip": "masked takes a mask"}),
                "steps": ("INT", {"default": 50, "min": 1, "max": 1000}),
                "precision": (PRECISIONS, {"default": "auto"}),
            }
        }

    def run(self, checkpoint: str, attention: str, steps: int, precision: Any) -> tuple[KVInverter]:
        """Load it; its files are read when a picture is tuned."""
        return (load(checkpoint, attention=attention, steps=steps, precision=precision),)


class TunePicture(Node):
    """Invert and tune one picture."""

    RETURN_TYPES: ClassVar = ("KV_RUN", "IMAGE")
    RETURN_NAMES: ClassVar = ("run", "reconstruction")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """A picture with its prompt, and a mask for variants that take one."""
        source = ("STRING", {"multiline": True, "tooltip": "what the picture shows"})
        required = {"model": ("KV_MODEL",), "image": ("IMAGE",), "source": source}
        folder = ("STRING", {"default": "", "tooltip": "the run folder, gone on with if it is there"})
        return {"required": required, "optional": {"mask": ("MASK",), "folder": folder}}

    def run(
        self,
        model: KVInverter,
        image: Float[Tensor, "n h w 3"],
        source: str,
        mask: Float[Tensor, "n h w"] | None = None,
        folder: str = "",
    ) -> tuple[Run, Tensor]:
        """Tune the first picture of the batch."""
        model.progress = Bar()
        run = model.tune(
            as_picture(image), source, folder or None, None if mask is None else as_picture(mask)
        )
        return run, as_tensor(run.reconstruction)


class EditPicture(Node):
    """A tuned picture edited to a target; every setting of an edit is an input."""

    RETURN_TYPES: ClassVar = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """A run, a target, and the dials."""
        target = ("STRING", {"multiline": True, "tooltip": "what it should become"})
        return {
            "required": {"run": ("KV_RUN",), "target": target},
            "optional": {dial.name: _input(dial) for dial in dials()},
        }

    def run(self, run: Run, target: str, **stands: Any) -> tuple[Tensor]:
        """An edit; what is left out is as the model was loaded."""
        run.owner.progress = Bar()
        settings = read([stands.get(dial.name) for dial in dials()])
        return (as_tensor(run.edit(target, **settings)),)


class FindSubject(Node):
    """The mask of a picture's subject, by SAM: at a point, or the most prominent."""

    RETURN_TYPES: ClassVar = ("MASK",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """A picture and a point."""
        at = ("INT", {"default": -1, "min": -1, "max": 16384, "tooltip": "in pixels; -1: the most prominent"})
        sam = (
            "STRING",
            {"default": "menagerie", "tooltip": "a folder as transformers saves a SAM, or a hub id"},
        )
        return {"required": {"image": ("IMAGE",), "x": at, "y": at, "sam": sam}}

    def run(self, image: Float[Tensor, "n h w 3"], x: int, y: int, sam: str) -> tuple[Tensor]:
        """1 on the subject, 0 elsewhere."""
        found = subject.at_points(as_picture(image), [(x, y)] if min(x, y) >= 0 else [], sam=sam)
        return (as_tensor(found),)


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


def _input(dial: Dial) -> tuple[Any, ...]:
    """A dial as ComfyUI has one; what the model decides if it is left empty is a text, a number too."""
    said: dict[str, Any] = {"tooltip": dial.help, "default": dial.default}
    if dial.kind == "choice":
        return list(dial.choices), said
    if dial.default is None or dial.kind == "text":
        return "STRING", {**said, "default": dial.default or ""}
    if dial.kind == "switch":
        return "BOOLEAN", said
    low, high = dial.range or (0.0, 1e6)
    kind = "INT" if dial.kind == "whole number" else "FLOAT"
    return kind, {**said, "min": low, "max": high, "step": dial.step}


def as_picture(tensor: Float[Tensor, "n h w *c"]) -> Image.Image:
    """The first of a batch of pictures or masks, in 0..1."""
    return Image.fromarray((tensor[0].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def as_tensor(image: Image.Image) -> Float[Tensor, "1 h w *c"]:
    """A batch of one picture or mask, in 0..1."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() / 255
    size = (1, image.height, image.width)
    return values.view(size if image.mode == "L" else (*size, -1))


NODE_CLASS_MAPPINGS = {
    "KVInversionLoad": LoadModel,
    "KVInversionTune": TunePicture,
    "KVInversionEdit": EditPicture,
    "KVInversionSubject": FindSubject,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "KVInversionLoad": "Load for KV Inversion",
    "KVInversionTune": "Tune a picture (KV Inversion)",
    "KVInversionEdit": "Edit a tuned picture (KV Inversion)",
    "KVInversionSubject": "Find the subject (SAM)",
}
