"""The VAE that takes the place of a checkpoint's own."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from kvinv_pl import menagerie
from kvinv_pl.errors import UserError
from kvinv_pl.models.conversion import converted
from kvinv_pl.models.families import vae_configuration
from kvinv_pl.models.folder import PARTS, model, read_json
from kvinv_pl.models.hub import file_of, vae_of
from kvinv_pl.models.loading import attempt, digest, located, sha256
from kvinv_pl.models.single_file import VAE, read_contents, weights


def other_vae(chosen: str | None) -> tuple[AutoencoderKL | None, dict[str, str]]:
    """The VAE that was chosen, if one was, and its digest."""
    if chosen is None:
        return None, {}
    needed = "expected a VAE: a .safetensors file, a folder as diffusers saves it, or a hub id"
    if chosen.count("/") > 1 and chosen.endswith(".safetensors"):  # it may be one of a repository's files
        place = file_of(chosen, "a VAE")
    else:
        place = located(chosen, menagerie.checkpoint, needed, files=True) or vae_of(chosen)
    if place.is_file():
        contents = read_contents(place, allow_pickle=False)
        if not any(contents.has(start) for start in (VAE, "encoder.down.")):
            contents.refuse_others("a VAE")
        configs = {"vae": attempt(place, lambda: vae_configuration(contents))}
        tensors = weights(place)
        return converted(place, tensors, AutoencoderKL, configs, "vae", torch.float32), {"vae": digest(place)}
    folder = place if (place / "config.json").is_file() else place / "vae"
    if (kind := read_json(folder, "config.json").get("_class_name")) != PARTS["vae"]:
        raise UserError(f"{folder} contains {kind}; {needed}")
    vae, files = model(folder, AutoencoderKL, torch_dtype=torch.float32)
    return vae, {"vae": sha256(folder, {*files, folder / "config.json"})}
