"""A checkpoint in one file, converted by diffusers with the configurations of its family."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextModel

from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.families import clip_tokenizer, configurations
from kvinv_pl.models.checkpoints.folder import Parts
from kvinv_pl.models.checkpoints.loading import REDOWNLOAD, digest, try_read
from kvinv_pl.models.checkpoints.single_file import read_contents, weights


def load_single_file(
    path: Path,
    dtype: torch.dtype,
    prediction: str | None,
    allow_pickle: bool,
    other_vae: AutoencoderKL | None,
) -> Parts:
    """The parts of a checkpoint in one file, converted by diffusers; its digest is that of the file."""
    contents = read_contents(path, allow_pickle)
    configs = configurations(contents, prediction, needs_vae=other_vae is None)
    tensors = weights(path)
    unet = convert(path, tensors, UNet2DConditionModel, configs, "unet", dtype)
    vae = other_vae
    if vae is None:
        vae = convert(path, tensors, AutoencoderKL, configs, "vae", torch.float32)
    text_encoder = convert(path, tensors, CLIPTextModel, configs, "text_encoder", dtype)
    identity = {"class": "StableDiffusionPipeline", "sha256": digest(path)}
    return Parts(
        unet, vae, text_encoder, clip_tokenizer(configs["pad_token"]), configs["scheduler"], identity
    )


def convert(
    path: Path,
    tensors: dict[str, torch.Tensor],
    cls: Any,
    configs: Mapping[str, Any],
    part: str,
    dtype: torch.dtype,
) -> Any:
    """One model out of the tensors of a file, complete."""
    with TemporaryDirectory(prefix="kvinv-") as folder:  # where diffusers reads a configuration from
        place = Path(folder, part)
        place.mkdir()
        (place / "config.json").write_text(json.dumps(configs[part]), encoding="utf-8")
        options = {"config": folder, "subfolder": part, "local_files_only": True, "torch_dtype": dtype}
        if cls is CLIPTextModel:
            read = partial(create_diffusers_clip_model_from_ldm, cls, tensors, **options)
        else:
            read = partial(cls.from_single_file, tensors, **options)
        model = try_read(path, read)
    if missing := [name for name, value in model.named_parameters() if value.is_meta]:
        raise UserError(
            f"{path} lacks {len(missing)} weights of its {part}, such as {missing[0]}; {REDOWNLOAD}"
        )
    return model
