"""Loads a checkpoint, a folder or one file, with its options; or its configurations on the meta device."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextModel

from kvinv_pl import menagerie
from kvinv_pl.attention.unet import refuse_other_conditions
from kvinv_pl.errors import UserError
from kvinv_pl.models.adapters.lora import merge_loras
from kvinv_pl.models.adapters.textual_inversion import add_embeddings
from kvinv_pl.models.checkpoints.conversion import convert, load_single_file
from kvinv_pl.models.checkpoints.families import configurations, vae_configuration
from kvinv_pl.models.checkpoints.folder import PARTS, Parts, load_folder, model, read_json, refuse_other_kinds
from kvinv_pl.models.checkpoints.hub import resolve_checkpoint, resolve_file, resolve_vae
from kvinv_pl.models.checkpoints.in_memory import IN_MEMORY, Pipeline, copy_parts
from kvinv_pl.models.checkpoints.loading import combined, digest, find_checkpoint, quiet, sha256, try_read
from kvinv_pl.models.checkpoints.single_file import VAE, read_contents, weights
from kvinv_pl.models.load_options import DEFAULTS, LoadOptions, as_list


def load(checkpoint: str | Pipeline, dtype: torch.dtype, options: LoadOptions = DEFAULTS) -> Parts:
    """A folder, a file, a hub id, "menagerie" or a pipeline in memory; `dtype` is not for the VAE."""
    name = checkpoint if isinstance(checkpoint, str) else IN_MEMORY
    place = resolve_checkpoint(checkpoint, options.variant) if isinstance(checkpoint, str) else checkpoint
    loras, words = as_list(options.loras), as_list(options.embeddings)
    read_as = torch.float32 if loras else dtype
    with quiet():
        vae, digests = _load_vae(options.vae)
        if isinstance(place, Path) and place.is_dir():
            found = load_folder(place, name, read_as, vae, options.variant)
        elif options.variant is not None:
            raise UserError(f"--model.variant: {name} has only one variant: leave it out")
        elif isinstance(place, Path):
            found = load_single_file(place, read_as, options.prediction_type, options.allow_pickle, vae)
        else:
            found = copy_parts(place, read_as, vae)
        merged, layers = merge_loras(loras, found.unet, found.text_encoder, options.allow_pickle)
        added, tokens = add_embeddings(words, found.tokenizer, found.text_encoder, options.allow_pickle)
    digests |= {**merged, **added}
    scheduler = dict(found.scheduler_config)
    overrides = {"prediction_type": options.prediction_type, "timestep_spacing": options.timestep_spacing}
    scheduler |= {option: chosen for option, chosen in overrides.items() if chosen is not None}
    if options.clip_skip != 1:
        _drop_last_layers(found.text_encoder, options.clip_skip)
        digests["clip_skip"] = str(options.clip_skip)
    if options.prompt_syntax != "plain":  # of the same words it makes something else
        digests["prompt_syntax"] = options.prompt_syntax
    if read_as != dtype:
        cast(Any, found.unet).to(dtype)
        cast(Any, found.text_encoder).to(dtype)
    identity = {"checkpoint": name, **found.identity, **options.record()}
    identity["sha256"] = combined(found.identity["sha256"], digests)
    return replace(found, scheduler_config=scheduler, identity=identity, notes=[*layers, *tokens])


def _load_vae(chosen: str | None) -> tuple[AutoencoderKL | None, dict[str, str]]:
    """The VAE that was chosen, if one was, and its digest."""
    if chosen is None:
        return None, {}
    needed = "expected a VAE: a .safetensors file, a folder as diffusers saves it, or a hub id"
    if chosen.count("/") > 1 and chosen.endswith(".safetensors"):  # it may be one of a repository's files
        place = resolve_file(chosen, "a VAE")
    else:
        place = find_checkpoint(chosen, menagerie.checkpoint, needed, files=True) or resolve_vae(chosen)
    if place.is_file():
        contents = read_contents(place, allow_pickle=False)
        if not any(contents.has(start) for start in (VAE, "encoder.down.")):
            contents.refuse_others("a VAE")
        configs = {"vae": try_read(place, lambda: vae_configuration(contents))}
        tensors = weights(place)
        return convert(place, tensors, AutoencoderKL, configs, "vae", torch.float32), {"vae": digest(place)}
    folder = place if (place / "config.json").is_file() else place / "vae"
    if (kind := read_json(folder, "config.json").get("_class_name")) != PARTS["vae"]:
        raise UserError(f"{folder} contains {kind}; {needed}")
    vae, files = model(folder, AutoencoderKL, torch_dtype=torch.float32)
    return vae, {"vae": sha256(folder, {*files, folder / "config.json"})}


def _drop_last_layers(text_encoder: CLIPTextModel, clip_skip: int) -> None:
    """Leave out the last layers: clip_skip 2 ends at the last but one."""
    layers = getattr(text_encoder, "text_model", text_encoder).encoder.layers
    if not 1 <= clip_skip <= len(layers):
        raise UserError(
            f"--model.clip_skip: expected 1 to {len(layers)}, the text model's layers, got {clip_skip}"
        )
    del layers[len(layers) + 1 - clip_skip :]
    text_encoder.config.num_hidden_layers = len(layers)


class Sizes(NamedTuple):
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


class MetaCheckpoint(NamedTuple):
    """A checkpoint without weights (meta device), and its sizes."""

    unet: UNet2DConditionModel
    sizes: Sizes
    vae: AutoencoderKL


def load_on_meta(checkpoint: str, allow_pickle: bool = False) -> MetaCheckpoint:
    """The networks of a checkpoint on the meta device; only configurations are read or fetched."""
    place = resolve_checkpoint(checkpoint, configs_alone=True)
    if place.is_file():  # what it predicts makes no difference here
        configs = configurations(read_contents(place, allow_pickle), "epsilon", needs_vae=False)
        unet, vae = configs["unet"], configs["vae"]
    else:
        refuse_other_kinds(checkpoint, read_json(place, "model_index.json"))
        unet, vae = (read_json(place, f"{part}/config.json") for part in ("unet", "vae"))
        refuse_other_conditions(unet, f"the U-Net of {checkpoint}")
    with torch.device("meta"), quiet():
        net = try_read(place / "unet", lambda: UNet2DConditionModel.from_config(unet))
        decoder = try_read(place / "vae", lambda: AutoencoderKL.from_config(vae))
    return MetaCheckpoint(net, try_read(place / "unet", lambda: sizes(net.config, vae)), decoder)
