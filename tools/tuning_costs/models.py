"""U-Nets of real geometry with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from kvinv_pl.attention import Selection, select, self_attentions
from kvinv_pl.attention.attachment import Attachment, attach
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
