"""A checkpoint in a folder, as diffusers saves it: whether it is of the right kind, and its parts, loaded."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from kvinv_pl.attention.unet import refuse_other_conditions
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.loading import REDOWNLOAD, load_json, load_pretrained, sha256, try_read
from kvinv_pl.models.checkpoints.weight_files import variants_in, weight_files

PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
NEEDED = "kvinv needs a Stable Diffusion 1 or 2 checkpoint as diffusers saves it"


@dataclass(frozen=True)
class Parts:
    """What a Stable Diffusion checkpoint is made of, and which one it is (checkpoint, class, sha256)."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: Mapping[str, Any]
    identity: Mapping[str, Any]
    notes: Sequence[str] = ()
    """Lines for the log: what was done to them."""


def load_folder(
    folder: Path, name: str, dtype: torch.dtype, other_vae: AutoencoderKL | None, variant: str | None = None
) -> Parts:
    """The parts of a folder as diffusers saves it, of which a VAE that was chosen takes the place of one."""
    index = read_json(folder, "model_index.json")
    refuse_other_kinds(name, index)
    refuse_other_conditions(read_json(folder, "unet/config.json"), f"the U-Net of {name}")
    refuse_other_variants(name, variant, _names(folder / "unet"))
    unet, unet_files = model(folder / "unet", UNet2DConditionModel, variant, torch_dtype=dtype)
    vae, vae_files = other_vae, list[Path]()
    if vae is None:
        vae, vae_files = model(folder / "vae", AutoencoderKL, variant, torch_dtype=torch.float32)
    text_encoder, text_files = model(folder / "text_encoder", CLIPTextModel, variant, dtype=dtype)
    tokens = _tokenizer(folder / "tokenizer")
    scheduler_config = read_json(folder, "scheduler/scheduler_config.json")
    files = {*unet_files, *vae_files, *text_files}
    files.update(path for part in (*PARTS, "scheduler") for path in (folder / part).glob("*.json"))
    files.update((folder / "tokenizer").glob("*.txt"))
    identity = {"class": str(index.get("_class_name")), "sha256": sha256(folder, files)}
    return Parts(unet, vae, text_encoder, tokens, scheduler_config, identity)


def refuse_other_kinds(checkpoint: str, index: Mapping[str, Any]) -> None:
    """Refuse a pipeline that is not made of the parts of Stable Diffusion 1 and 2."""
    kind = str(index.get("_class_name"))
    if "StableDiffusionXL" in kind or ("text_encoder_2" in index and "unet" in index):
        raise UserError(f"{checkpoint} is SDXL ({kind}), which is not supported; {NEEDED}")
    if "transformer" in index or "unet" not in index:
        raise UserError(
            f"{checkpoint} contains {kind}, a transformer model or another without a U-Net; {NEEDED}"
        )
    for part, expected in PARTS.items():
        got = (index.get(part) or [None, None])[1]
        if got not in (expected, f"{expected}Fast"):
            raise UserError(
                f"{checkpoint} contains {kind} whose {part} is {got}, expected {expected}; {NEEDED}"
            )


def model(folder: Path, cls: Any, variant: str | None = None, **dtype: torch.dtype) -> tuple[Any, list[Path]]:
    """One model of a checkpoint, complete, and the files that its weights came from."""
    found = weight_files(_names(folder), folder.name, variant)
    if found is None or not (folder / "config.json").is_file():
        wanted = "model" if folder.name == "text_encoder" else "diffusion_pytorch_model"
        raise UserError(
            f"{folder} is missing or incomplete: expected config.json, {wanted}.safetensors; {REDOWNLOAD}"
        )
    options = {"variant": found.variant or None, "use_safetensors": found.suffix == ".safetensors"}
    return load_pretrained(cls, folder, **options, **dtype), [folder / name for name in found.names]


def refuse_other_variants(checkpoint: str, variant: str | None, names: Collection[str]) -> None:
    """Refuse a variant that is not among these names, the files in the U-Net's folder."""
    found = weight_files(names, "unet", variant)
    if variant is not None and found is not None and found.variant != variant:
        has = " and ".join(kind or "full ones" for kind in variants_in(names, "unet"))
        raise UserError(f"--model.variant: {checkpoint} has no weights of {variant!r}, it has {has}")


def _names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()] if folder.is_dir() else []


def _tokenizer(folder: Path) -> CLIPTokenizer:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(
            f"{folder} is missing or incomplete: expected vocab.json and merges.txt; {REDOWNLOAD}"
        )
    return try_read(folder, lambda: CLIPTokenizer.from_pretrained(folder))


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a checkpoint; if it is missing, say what the folder seems to be."""
    if (folder / name).is_file():
        return load_json(folder / name)
    lone = read_json(folder, "config.json") if (folder / "config.json").is_file() else {}
    kind = lone.get("_class_name") or (lone.get("architectures") or [lone.get("model_type")])[0]
    if not kind and (files := sorted(folder.glob("*.safetensors"))):
        raise UserError(f"{folder} has no {name}: if {files[0].name} is the checkpoint, give that file")
    raise UserError(f"{folder} has no {name}{f', it contains only {kind}' if kind else ''}; {NEEDED}")
