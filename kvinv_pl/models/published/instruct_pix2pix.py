"""InstructPix2Pix (Brooks et al., 2023): a Stable Diffusion that was trained to follow instructions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix import (
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoint import sizes
from kvinv_pl.models.checkpoints.hub import resolve_checkpoint
from kvinv_pl.models.checkpoints.loading import find_checkpoint, quiet, try_read

NEEDED = (
    "expected an InstructPix2Pix folder as diffusers saves it, or its hub id (timbrooks/instruct-pix2pix)"
)


class InstructPix2PixModel:
    """A loaded checkpoint, sampled by Euler's ancestral steps as its authors do."""

    def __init__(self, pipeline: StableDiffusionInstructPix2PixPipeline) -> None:
        self.pipeline: Any = pipeline
        with quiet():
            euler: Any = EulerAncestralDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        self.pipeline.scheduler = euler
        self.pipeline.set_progress_bar_config(disable=True)
        _, self.multiple, self.sample_size = sizes(self.pipeline.unet.config, self.pipeline.vae.config)

    @classmethod
    def load(
        cls, checkpoint: str, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> InstructPix2PixModel:
        """Load a folder or hub id; a safety checker is left out."""
        where = find_checkpoint(checkpoint, _refuse_menagerie, NEEDED) or resolve_checkpoint(checkpoint)
        kind, nothing = StableDiffusionInstructPix2PixPipeline, None
        with quiet():
            pipeline: Any = try_read(
                where,
                lambda: kind.from_pretrained(
                    str(where),
                    torch_dtype=dtype,
                    safety_checker=nothing,
                    feature_extractor=nothing,
                    requires_safety_checker=False,
                ),
            )
        channels, wanted = pipeline.unet.config.in_channels, 2 * pipeline.vae.config.latent_channels
        if channels != wanted:
            raise UserError(f"{checkpoint} has a U-Net of {channels} input channels, not {wanted}; {NEEDED}")
        return cls(pipeline.to(device))

    @torch.no_grad()
    def edit(
        self,
        pixels: Float[Tensor, "1 3 h w"],
        instruction: str,
        steps: int,
        guidance: float,
        image_guidance: float,
        seed: int,
    ) -> Float[Tensor, "1 3 h w"]:
        """The edited picture, as the source in -1..1; guidance is s_T of Eq. 3, and image_guidance s_I."""
        with quiet():
            found = self.pipeline(
                instruction, image=(pixels + 1) / 2, num_inference_steps=steps, guidance_scale=guidance,
                image_guidance_scale=image_guidance, generator=torch.Generator().manual_seed(seed),
                output_type="pt",
            ).images  # fmt: skip
        return found.float() * 2 - 1


def _refuse_menagerie() -> Path:
    raise UserError(
        "the embedded world has no InstructPix2Pix: train one with tools/train_menagerie.py instruct, and "
        f"give its folder; {NEEDED}"
    )
