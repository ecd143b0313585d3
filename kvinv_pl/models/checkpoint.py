"""A checkpoint's folder: where it is, whether it is of the right kind, and its parts, loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import CLIPTextModel, CLIPTokenizer

from kvinv_pl import menagerie
from kvinv_pl.errors import UserError
from kvinv_pl.models.loading import AGAIN, attempt, first_line, located, quiet, sha256

PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
NEEDED = "kvinv needs a Stable Diffusion 1 or 2 checkpoint as diffusers saves it"
FROM_FILE = (
    "StableDiffusionPipeline.from_single_file(file).save_pretrained(folder) of diffusers makes one of it"
)


@dataclass(frozen=True)
class Parts:
    """What a Stable Diffusion checkpoint is made of, and which one it is (checkpoint, class, sha256)."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: Mapping[str, Any]
    identity: Mapping[str, str]


def load(checkpoint: str, dtype: torch.dtype) -> Parts:
    """A folder as diffusers saves it, a hub id (owner/name), or "menagerie"; `dtype` is not for the VAE."""
    folder = _folder(checkpoint)
    index = _json(folder, "model_index.json")
    _refuse_other_kinds(checkpoint, index)
    with quiet():
        unet, unet_files = _model(folder / "unet", UNet2DConditionModel, torch_dtype=dtype)
        vae, vae_files = _model(folder / "vae", AutoencoderKL, torch_dtype=torch.float32)
        text_encoder, text_files = _model(folder / "text_encoder", CLIPTextModel, dtype=dtype)
        tokenizer = _tokenizer(folder / "tokenizer")
        scheduler_config = _json(folder, "scheduler/scheduler_config.json")
    files = {*unet_files, *vae_files, *text_files}
    files.update(path for part in (*PARTS, "scheduler") for path in (folder / part).glob("*.json"))
    files.update((folder / "tokenizer").glob("*.txt"))
    identity = {"checkpoint": str(checkpoint), "class": str(index.get("_class_name"))}
    identity["sha256"] = sha256(folder, files)
    return Parts(unet, vae, text_encoder, tokenizer, scheduler_config, identity)


@dataclass(frozen=True)
class Sizes:
    """What pictures a checkpoint takes, in pixels: the VAE's factor, what sides divide by, its own size."""

    vae_factor: int
    multiple: int
    sample: tuple[int, int]


def sizes(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Sizes:
    """The sizes (height, width) from the configurations of a U-Net and a VAE."""
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    size = unet["sample_size"] or 64
    if isinstance(size, int):
        # the first converters wrote 32 for every Stable Diffusion; diffusers' pipelines correct it too
        written_by = str(unet.get("_diffusers_version") or "1.0").split(".")
        early = written_by[0] == "0" and int(written_by[1]) < 9
        size = (max(size, 64), max(size, 64)) if early else (size, size)
    multiple = factor * 2 ** (len(unet["block_out_channels"]) - 1)
    return Sizes(factor, multiple, (size[0] * factor, size[1] * factor))


def outline(checkpoint: str) -> tuple[UNet2DConditionModel, Sizes]:
    """The U-Net without weights (meta device), and the sizes; only configurations are read or fetched."""
    folder = _folder(checkpoint, configs_alone=True)
    _refuse_other_kinds(checkpoint, _json(folder, "model_index.json"))
    unet, vae = (_json(folder, f"{part}/config.json") for part in ("unet", "vae"))
    with torch.device("meta"), quiet():
        shadow = attempt(folder / "unet", lambda: UNet2DConditionModel.from_config(unet))
    return shadow, attempt(folder / "unet", lambda: sizes(shadow.config, vae))


def _folder(checkpoint: str, configs_alone: bool = False) -> Path:
    """Where the files of a checkpoint are, fetched from the hub if need be."""
    needed = f"{NEEDED}, or a hub id (owner/name), or menagerie"
    if (folder := located(checkpoint, menagerie.checkpoint, needed, FROM_FILE)) is not None:
        return folder
    try:
        with quiet(bars=True):
            from diffusers.pipelines.pipeline_utils import DiffusionPipeline

            path = Path(hf_hub_download(checkpoint, "model_index.json"))
            _refuse_other_kinds(checkpoint, _json(path.parent, path.name))
            if configs_alone:
                for part in ("unet", "vae"):
                    hf_hub_download(checkpoint, f"{part}/config.json")
                return path.parent
            unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
            return Path(DiffusionPipeline.download(checkpoint, **unused))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"no folder {checkpoint} here, and not available from the hub: {_of_hub(error)}"
        ) from error


def _of_hub(error: Exception) -> str:
    """Why a download from the hub failed; the first line of the hub's own errors is only a number."""
    if isinstance(error, GatedRepoError):
        return "it is gated; ask for access on its page, and log in by `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "no public model has that name; check it, or log in by `hf auth login`"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"the model of that name lacks files; {NEEDED}"
    return first_line(error)


def _refuse_other_kinds(checkpoint: str, index: Mapping[str, Any]) -> None:
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


def _model(folder: Path, cls: Any, **dtype: torch.dtype) -> tuple[Any, list[Path]]:
    """One model of a checkpoint, complete, and the files that its weights came from."""
    stems = ("model", "pytorch_model") if folder.name == "text_encoder" else ("diffusion_pytorch_model",) * 2
    for variant in ("", ".fp16"):
        for stem, suffix in zip(stems, (".safetensors", ".bin"), strict=True):
            name = f"{stem}{variant}"
            files = [*folder.glob(f"{name}{suffix}"), *folder.glob(f"{name}-*-of-*{suffix}")]
            if files and (folder / "config.json").is_file():
                options = {"variant": variant[1:] or None, "use_safetensors": suffix == ".safetensors"}
                load = partial(cls.from_pretrained, folder, output_loading_info=True, **options, **dtype)
                model, info = attempt(folder, load)
                if missing := sorted(info["missing_keys"]):
                    raise UserError(f"{folder} lacks {len(missing)} weights, such as {missing[0]}; {AGAIN}")
                return model, files
    raise UserError(
        f"{folder} is missing or incomplete: expected config.json, {stems[0]}.safetensors; {AGAIN}"
    )


def _tokenizer(folder: Path) -> CLIPTokenizer:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{folder} is missing or incomplete: expected vocab.json and merges.txt; {AGAIN}")
    return attempt(folder, lambda: CLIPTokenizer.from_pretrained(folder))


def _json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a checkpoint; if it is missing, say what the folder seems to be."""
    if (folder / name).is_file():
        return attempt(folder / name, lambda: dict(json.loads((folder / name).read_text(encoding="utf-8"))))
    lone = _json(folder, "config.json") if (folder / "config.json").is_file() else {}
    kind = lone.get("_class_name") or (lone.get("architectures") or [lone.get("model_type")])[0]
    raise UserError(f"{folder} has no {name}{f', it contains {kind} alone' if kind else ''}; {NEEDED}")
