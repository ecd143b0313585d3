"""U-Nets of real geometry with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from kvinv_pl.attention import Selection, select, self_attentions
from kvinv_pl.attention.attachment import Attachment, attach
from kvinv_pl.models.checkpoints.families import clip_tokenizer
from kvinv_pl.models.feature_cache import FeatureCache

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


def pipeline(geometry: str) -> StableDiffusionPipeline:
    """A whole model of a geometry: VAE and text model are as much narrower than those of 1.5 as the U-Net."""
    config = {**FOUR_LEVELS, **GEOMETRIES[geometry]}
    width, part = config["cross_attention_dim"], config["block_out_channels"][0] / 320
    words: Any = clip_tokenizer("<|endoftext|>")
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12,
        num_attention_heads=max(1, width // 64),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    vae: dict[str, Any] = {
        "block_out_channels": [max(32, round(each * part / 32) * 32) for each in (128, 256, 512, 512)],
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 8 * config["sample_size"],
    }
    scheduler: Any = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        set_alpha_to_one=False, clip_sample=False,
    )  # fmt: skip
    nothing: Any = None
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**vae),
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=UNet2DConditionModel(**config),
        scheduler=scheduler,
        safety_checker=nothing,
        feature_extractor=nothing,
        requires_safety_checker=False,
    )


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
