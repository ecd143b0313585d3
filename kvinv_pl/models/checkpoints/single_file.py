"""A model in one file, as model sites have them: what the file contains, and its tensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import load_single_file_checkpoint

from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.loading import try_read

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

LORA = "a LoRA: give it to --model.loras, beside its checkpoint"
# how the name of a tensor begins (or with a *, what it contains), what such a file is, and what to do with it
UNSUPPORTED = (
    ("conditioner.embedders.", "SDXL, which is not supported"),
    ("*double_blocks.", "FLUX or another transformer, which is not supported"),
    ("*joint_blocks.", "Stable Diffusion 3, which is not supported"),
    (f"{UNET}label_emb.", "a U-Net of SDXL or unCLIP, which is not supported"),
    ("control_model.", "a ControlNet"),
    ("controlnet_", "a ControlNet"),
    ("*hada_w1", "a LyCORIS, which is not supported"),
    ("*lokr_w1", "a LyCORIS, which is not supported"),
    ("*lora_", LORA),
    ("*.lora.", LORA),
    ("emb_params", "a textual inversion: give it to --model.embeddings, beside a checkpoint"),
    ("image_proj", "an IP-Adapter, which is not supported"),
    ("down_blocks.", "a U-Net alone as diffusers saves it: give the folder that has model_index.json"),
    ("encoder.", "a VAE or text encoder alone: a VAE goes to --model.vae, beside a checkpoint"),
    ("text_model.", "only a text encoder"),
)


@dataclass(frozen=True)
class Contents:
    """The names and shapes of a file's tensors, and its metadata."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def has(self, start: str) -> bool:
        """Whether any tensor's name begins so, or (with a * before it) contains this."""
        if start.startswith("*"):
            return any(start[1:] in name for name in self.shapes)
        return any(name.startswith(start) for name in self.shapes)

    def count(self, pattern: str) -> int:
        """Up to which number, from 0 on, there is a tensor of this name."""
        return sum(1 for _ in takewhile(lambda n: pattern.format(n) in self.shapes, count()))

    def refuse_others(self, expected: str = "a Stable Diffusion 1 or 2 checkpoint") -> None:
        """Refuse what is no checkpoint of Stable Diffusion 1 or 2, by what it is."""
        what = next((what for sign, what in UNSUPPORTED if self.has(sign)), None)
        if what is None and not self.has(UNET):
            what = f"tensors that are not known, such as {next(iter(self.shapes), 'none')}"
        if what is not None or expected == "a VAE":
            raise UserError(f"{self.path} contains {what or 'no VAE'}; expected {expected}")


def read_contents(path: Path, allow_pickle: bool) -> Contents:
    """The contents of a safetensors file, by its header alone; of a pickled one where that is allowed."""
    if path.suffix != ".safetensors":
        refuse_pickle(path, allow_pickle)
        tensors = read_tensors(path)
        return Contents(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return try_read(path, lambda: _header(path))


def _header(path: Path) -> Contents:
    with path.open("rb") as stream:
        size, length = int.from_bytes(stream.read(8), "little"), path.stat().st_size
        if not 2 <= size <= min(100_000_000, length - 8):  # as the format bounds it
            raise ValueError("it is not a safetensors file, or is cut short")
        parts: dict[str, Any] = json.loads(stream.read(size))
    metadata = parts.pop("__metadata__", {})
    if max((part["data_offsets"][1] for part in parts.values()), default=0) != length - 8 - size:
        raise ValueError("it is cut short")
    return Contents(path, {name: tuple(part["shape"]) for name, part in parts.items()}, metadata)


def refuse_pickle(path: Path, allowed: bool) -> None:
    """Refuse a file that is not safetensors, unless it is asked for."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is not a model: expected a .safetensors file, or a folder")
    if path.suffix != ".safetensors" and not allowed:
        raise UserError(
            f"{path} is pickled, and opening a pickle can run code: expected .safetensors; if you trust "
            "where it is from, its tensors alone are read with --model.allow_pickle true (or, of "
            "`kvinv sites` and `kvinv variants`, --allow_pickle true)"
        )


def read_state_dict(path: Path) -> Mapping[str, Any]:
    """What a file contains, tensors and what else its format has."""
    read: Any = load_single_file_checkpoint
    if path.suffix == ".safetensors":
        return try_read(path, lambda: read(str(path)))
    try:
        return read(str(path))
    except Exception as error:
        raise UserError(
            f"{path} is damaged, or contains Python objects other than tensors, which are not opened: "
            "expected .safetensors; convert it where you trust it"
        ) from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file."""
    return {
        name: tensor for name, tensor in read_state_dict(path).items() if isinstance(tensor, torch.Tensor)
    }


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, with the text encoder's names as diffusers knows them."""
    tensors = read_tensors(path)
    if any(name.startswith(f"{CLIP}text_model.") for name in tensors):
        return tensors
    renamed = f"{CLIP}text_model."  # some merging tools leave this part out
    return {
        name.replace(CLIP, renamed, 1) if name.startswith(CLIP) else name: tensor
        for name, tensor in tensors.items()
    }
