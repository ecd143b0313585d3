"""U-Nets of real geometry with random weights, and small Stable Diffusion folders for whole runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from kvinv_pl import menagerie
from kvinv_pl.attention import Selection, select, self_attentions
from kvinv_pl.attention.attachment import Attachment, attach
from kvinv_pl.models.feature_cache import FeatureCache
from kvinv_pl.models.loading import quiet

FOUR_LEVELS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "attention_head_dim": 8,
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768},
    "sd15-quarter": {
        "sample_size": 16,
        "block_out_channels": (96, 192, 384, 384),
        "cross_attention_dim": 192,
    },
    "sd15-half": {"sample_size": 32, "block_out_channels": (160, 320, 640, 640), "cross_attention_dim": 384},
}
"""sd15: Stable Diffusion 1.5 at 512 px. The others: its blocks, narrower and at 128 or 256 px, for a CPU."""


@dataclass
class Tuning:
    """One timestep of a picture that is being tuned: a U-Net with CP-attn, and what it is given."""

    unet: UNet2DConditionModel
    attachment: Attachment
    cache: FeatureCache
    inputs: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, geometry: str, where: str, branches: int, device: str, dtype: torch.dtype) -> Tuning:
        """The U-Net of a geometry on a device, frozen and held in dtype; "meta" takes no memory."""
        config = {**FOUR_LEVELS, **GEOMETRIES[geometry]}
        with torch.device(device):
            unet = UNet2DConditionModel(**config)
            for value in unet.parameters():  # .to() of diffusers warns of what its own loading would keep
                value.data = value.data.to(dtype)
            unet.requires_grad_(False).eval()
            size, width = config["sample_size"], config["cross_attention_dim"]
            sites = select(self_attentions(unet, (size, size)), Selection(where))
            psi = {site.path: FullKV(site) for site in sites}
            inputs = (
                torch.zeros(branches, 4, size, size, dtype=dtype),
                torch.full((branches,), 500),
                torch.zeros(branches, 77, width, dtype=dtype),
            )
        return cls(unet, attach(unet, psi), FeatureCache(unet, psi.values()), inputs)

    @property
    def psi(self) -> list[nn.Parameter]:
        """Every value of psi."""
        return [value for cp in self.attachment.psi.values() for value in cp.parameters()]

    def forward(self) -> Tensor:
        """The network's output, in the mode that is set."""
        z, t, prompt = self.inputs
        return self.unet(z, t, encoder_hidden_states=prompt, return_dict=False)[0]

    def inner_step(self) -> None:
        """A forward and a backward to psi."""
        for value in self.psi:
            value.grad = None
        self.forward().float().square().sum().backward()


def tiny_checkpoint(folder: Path) -> Path:
    """A Stable Diffusion folder whose network costs next to nothing, so that what is around it shows."""
    unet = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
        "cross_attention_dim": 8, "attention_head_dim": 2, "block_out_channels": (8, 8), "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return _random_checkpoint(folder, unet, levels=2)


def checkpoint_of(geometry: str, folder: Path) -> Path:
    """A Stable Diffusion folder with the U-Net of a geometry, for pictures 8 times its latents' size."""
    return _random_checkpoint(folder, {**FOUR_LEVELS, **GEOMETRIES[geometry]}, levels=4)


def _random_checkpoint(folder: Path, unet: dict[str, Any], levels: int) -> Path:
    """A U-Net of random weights, and a VAE and a text encoder that are as small as can be."""
    source = menagerie.checkpoint()
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(source / name, folder / name)
    shutil.copy(source / "model_index.json", folder)
    vocabulary = json.loads((source / "text_encoder" / "config.json").read_text())["vocab_size"]
    vae: dict[str, Any] = {
        "latent_channels": 4, "sample_size": 8 * 2**levels, "norm_num_groups": 4,
        "block_out_channels": (8,) * levels, "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }  # fmt: skip
    torch.manual_seed(0)
    with quiet():
        UNet2DConditionModel(**unet).save_pretrained(folder / "unet")
        AutoencoderKL(**vae).save_pretrained(folder / "vae")
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary, hidden_size=unet["cross_attention_dim"], intermediate_size=16,
                num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32,
                bos_token_id=0, eos_token_id=1, pad_token_id=1,
            )
        ).save_pretrained(folder / "text_encoder")  # fmt: skip
    return folder
