"""Nodes for ComfyUI: load, tune, edit, mask; `comfyui/` in the repository is the folder that it loads."""

from pathlib import Path
from typing import Any, ClassVar, get_args

from jaxtyping import Float
from torch import Tensor

from kvinv_pl.api import KVInverter, Run, load
from kvinv_pl.app import subject_mask
from kvinv_pl.app.comfyui_types import Bar, as_input, as_mask, as_picture, as_tensor
from kvinv_pl.app.edit_options import edit_options, read
from kvinv_pl.attention.registry import variants
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.models.load_options import Precision

Inputs = dict[str, dict[str, Any]]


class Node:
    """What ComfyUI asks of every node; `run` is called with the inputs by their names.

    It is called again when an input changes, and for nothing else: nothing in a node is random.
    """

    CATEGORY: ClassVar[str] = "KV Inversion"
    FUNCTION: ClassVar[str] = "run"


class LoadModel(Node):
    """A checkpoint with the settings of the tuning."""

    DESCRIPTION: ClassVar = "A Stable Diffusion checkpoint, and how pictures are tuned with it."
    RETURN_TYPES: ClassVar = ("KV_MODEL",)
    RETURN_NAMES: ClassVar = ("model",)
    OUTPUT_TOOLTIPS: ClassVar = ("for Tune a picture; its files are read when it begins",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """As of `kvinv_pl.load`."""
        checkpoint = "menagerie, a diffusers folder, a .safetensors file, or a hub id"
        attention = "which variant of CP-attn; masked takes a mask"
        steps = "number of DDIM steps, of the tuning and of edits; with 10, most edits miss the action"
        precision = "precision of the U-Net and the text model; auto: depends on checkpoint and device"
        return {
            "required": {
                "checkpoint": ("STRING", {"default": "menagerie", "tooltip": checkpoint}),
                "attention": (sorted(variants()), {"default": "full_kv", "tooltip": attention}),
                "steps": ("INT", {"default": 50, "min": 1, "max": 1000, "tooltip": steps}),
                "precision": ([*get_args(Precision)], {"default": "auto", "tooltip": precision}),
            }
        }

    def run(self, checkpoint: str, attention: str, steps: int, precision: Any) -> tuple[KVInverter]:
        """Load it; its files are read when a picture is tuned."""
        return (load(checkpoint, attention=attention, steps=steps, precision=precision),)


class TunePicture(Node):
    """Invert and tune one picture."""

    DESCRIPTION: ClassVar = "Inverts and tunes one picture, once; its edits need no new tuning."
    RETURN_TYPES: ClassVar = ("KV_RUN", "IMAGE")
    RETURN_NAMES: ClassVar = ("run", "reconstruction")
    OUTPUT_TOOLTIPS: ClassVar = ("for Edit a tuned picture", "the picture as the tuned model gives it back")
    _tuned: ClassVar[set[str]] = set()

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """A picture with its prompt, and a mask for variants that take one."""
        source = ("STRING", {"multiline": True, "default": "", "tooltip": "what the picture shows"})
        folder = "the run folder, resumed if it exists; left empty, the run is deleted with the graph"
        return {
            "required": {
                "model": ("KV_MODEL", {"tooltip": "from Load for KV Inversion"}),
                "image": ("IMAGE", {"tooltip": "a picture of any size; only the first of a batch"}),
                "source": source,
            },
            "optional": {
                "mask": ("MASK", {"tooltip": "the subject's mask, in the picture's size; for masked"}),
                "folder": ("STRING", {"default": "", "tooltip": folder}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, folder: str = "", **inputs: Any) -> float | str:
        """Not equal to itself where a folder that was tuned here has gone since: it is tuned anew."""
        return (
            float("nan") if folder in cls._tuned and not RunStore(Path(folder).expanduser()).has_run() else ""
        )

    def run(
        self,
        model: KVInverter,
        image: Float[Tensor, "n h w c"],
        source: str,
        mask: Float[Tensor, "*n h w"] | None = None,
        folder: str = "",
    ) -> tuple[Run, Tensor]:
        """Tune it, from where it was stopped if there is a folder."""
        run = model.tune(as_picture(image), source, folder or None, as_mask(mask), progress=Bar())
        if folder:
            self._tuned.add(folder)
        return run, as_tensor(run.reconstruction)


class EditPicture(Node):
    """A tuned picture edited to a target; every setting of an edit is an input."""

    DESCRIPTION: ClassVar = "Changes by words what the subject of a tuned picture is doing."
    RETURN_TYPES: ClassVar = ("IMAGE",)
    OUTPUT_TOOLTIPS: ClassVar = ("the edit, in the picture's size",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """A run, a target, and the settings of an edit."""
        target = ("STRING", {"multiline": True, "default": "", "tooltip": "what it should become"})
        run = ("KV_RUN", {"tooltip": "from Tune a picture"})
        return {
            "required": {"run": run, "target": target},
            "optional": {option.name: as_input(option) for option in edit_options()},
        }

    def run(self, run: Run, target: str, **options: Any) -> tuple[Tensor]:
        """An edit; what is left out is as the model was loaded."""
        settings = read([options.get(option.name) for option in edit_options()])
        return (as_tensor(run.edit(target, progress=Bar(), **settings)),)


class FindSubject(Node):
    """The mask of a picture's subject, by SAM: at a point, or the most prominent."""

    DESCRIPTION: ClassVar = "The mask of a picture's subject, by Segment Anything."
    RETURN_TYPES: ClassVar = ("MASK",)
    OUTPUT_TOOLTIPS: ClassVar = ("1 on the subject, 0 elsewhere",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """A picture and a point."""
        at = ("INT", {"default": -1, "min": -1, "max": 16384, "tooltip": "in pixels; -1: the most prominent"})
        sam = "menagerie, a transformers SAM folder, or a hub id"
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "a picture; only the first of a batch"}), "x": at, "y": at,
                "sam": ("STRING", {"default": "menagerie", "tooltip": sam}),
            }
        }  # fmt: skip

    def run(self, image: Float[Tensor, "n h w c"], x: int, y: int, sam: str) -> tuple[Tensor]:
        """1 on the subject, 0 elsewhere."""
        found = subject_mask.at_points(as_picture(image), [(x, y)] if min(x, y) >= 0 else [], sam=sam)
        return (as_tensor(found),)


NODES: dict[str, tuple[type[Node], str]] = {
    "KVInversionLoad": (LoadModel, "Load for KV Inversion"),
    "KVInversionTune": (TunePicture, "Tune a picture (KV Inversion)"),
    "KVInversionEdit": (EditPicture, "Edit a tuned picture (KV Inversion)"),
    "KVInversionSubject": (FindSubject, "Find the subject (SAM)"),
}
NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, (_, title) in NODES.items()}
