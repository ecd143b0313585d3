"""A Stable Diffusion checkpoint, frozen, as encode / decode / embed / eps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from kvinv_pl.algorithm.ddim import StepTable, noised, true_v
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoint import load, sizes
from kvinv_pl.models.checkpoints.finite import require_finite
from kvinv_pl.models.checkpoints.folder import NEEDED
from kvinv_pl.models.checkpoints.in_memory import Pipeline
from kvinv_pl.models.checkpoints.loading import try_read
from kvinv_pl.models.load_options import DEFAULTS, LoadOptions, Spacing
from kvinv_pl.models.text.prompt_reader import PromptReader
from kvinv_pl.models.text.prompt_syntax import PromptSyntax
from kvinv_pl.models.vae_tiles import tile

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PIXELS_AT_ONCE = 512 * 512  # of the VAE, whose memory grows with them
MIN_ALPHA = 2.0**-24
"""alpha-bar at the last timestep of zero terminal SNR, in place of 0, as diffusers' Euler has it."""


class Backbone(nn.Module):
    """A frozen latent diffusion model; the U-Net and the text model in a dtype of choice, the VAE in fp32."""

    alphas_cumprod: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler_config: Mapping[str, Any],
        identity: Mapping[str, Any],
        notes: Sequence[str] = (),
        prompt_syntax: PromptSyntax = "plain",
    ) -> None:
        """Freeze the parts; scheduler_config is that of the checkpoint, whichever scheduler it is for."""
        super().__init__()
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae.float(), text_encoder, tokenizer
        self.identity, self.notes = dict(identity), list(notes)
        self.scheduler = _ddim(scheduler_config)
        self.predicts_v = self.scheduler.config["prediction_type"] == "v_prediction"
        self.register_buffer("alphas_cumprod", self.scheduler.alphas_cumprod.clone(), persistent=False)
        self.latent_channels = int(vae.config["latent_channels"])
        self.vae_factor, self.multiple, self.sample_size = sizes(unet.config, vae.config)
        """Pixels of a latent's; what both sides of a picture are multiples of; height and width made for."""
        self.prompts = PromptReader(tokenizer, text_encoder, prompt_syntax)
        self._check_parts()
        self.requires_grad_(False).train(False)

    @classmethod
    def load(
        cls, checkpoint: str | Pipeline, dtype: torch.dtype = torch.float32, options: LoadOptions = DEFAULTS
    ) -> Backbone:
        """Load a folder as diffusers saves it, a file, a hub id, "menagerie", or a pipeline in memory."""
        return cls(**vars(load(checkpoint, dtype, options)), prompt_syntax=options.prompt_syntax)

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode, whatever mode a trainer sets."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c i j"]:
        """Encode(I): the mean of the posterior for pixels in [-1, 1], in the scale of the U-Net, in fp32."""
        h, w = pixels.shape[-2:]
        if h % self.vae_factor or w % self.vae_factor:
            raise UserError(f"both sides of a picture must be multiples of {self.vae_factor}, got {h} x {w}")
        shift, scale = self.vae.config.get("shift_factor") or 0.0, self.vae.config["scaling_factor"]
        tile(self.vae, h, w)
        with torch.autocast(pixels.device.type, enabled=False):
            rows = pixels.float().split(max(1, PIXELS_AT_ONCE // (h * w)))
            means = torch.cat([self.vae.encode(x, return_dict=False)[0].mean for x in rows])
        return require_finite((means - shift) * scale, "what the VAE makes of the picture")

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "n c i j"]) -> Float[Tensor, "n 3 h w"]:
        """Decode(z_0): pixels in [-1, 1], in fp32."""
        shift, scale = self.vae.config.get("shift_factor") or 0.0, self.vae.config["scaling_factor"]
        h, w = (side * self.vae_factor for side in z.shape[-2:])
        at_once = max(1, PIXELS_AT_ONCE // (h * w))
        tile(self.vae, h, w)
        with torch.autocast(z.device.type, enabled=False):
            rows = (z.float() / scale + shift).split(at_once)
            pixels = torch.cat([self.vae.decode(x, return_dict=False)[0] for x in rows])
        if not pixels.isfinite().all():
            raise UserError(
                "the decoded picture is not finite: the latents diverged; "
                "use a lower guidance scale or learning rate, or float32 in place of half precision"
            )
        return pixels.clamp(-1, 1)

    def embed(self, prompts: list[str]) -> Float[Tensor, "n L d"]:
        """The text model's reading of prompts, as long as one forward needs them; `prompts` says how."""
        return self.prompts.embed(prompts)

    def predict(
        self, z: Float[Tensor, "rows c i j"], t: Int[Tensor, " rows"], prompt: Float[Tensor, "rows L d"]
    ) -> Float[Tensor, "rows c i j"]:
        """What the U-Net gives for z, t and a prompt, in fp32: epsilon or v, as its schedule knows."""
        dtype = self.unet.conv_in.weight.dtype
        out = self.unet(z.to(dtype), t, encoder_hidden_states=prompt.to(dtype), return_dict=False)[0]
        return out.float()

    def noised(
        self, z_0: Float[Tensor, "_ c i j"], noise: Float[Tensor, "rows c i j"], t: int | Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows c i j"]:
        """z_0, of one row or of each, with this noise at timestep t, in fp32."""
        return noised(z_0, noise, self.alphas_cumprod[t])

    def true_output(
        self, z_0: Float[Tensor, "_ c i j"], noise: Float[Tensor, "rows c i j"], t: int | Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows c i j"]:
        """What the U-Net should give for `noised`: the noise itself or v, as it predicts."""
        return true_v(z_0, noise, self.alphas_cumprod[t]) if self.predicts_v else noise

    def step_table(self, steps: int) -> StepTable:
        """The DDIM steps of the checkpoint's own schedule, each going to the next entry of the table."""
        train = self.scheduler.config["num_train_timesteps"]
        if not 1 <= steps <= train:
            raise UserError(f"the number of steps must be 1 to {train}, got {steps}")
        self.scheduler.set_timesteps(steps)
        # trailing spacing may come with one timestep too many, below zero
        timesteps = self.scheduler.timesteps[:steps]
        final_alpha = float(self.scheduler.final_alpha_cumprod)
        alphas = self.scheduler.alphas_cumprod
        if self.predicts_v:  # which tells of the picture even there; epsilon does not
            alphas = torch.where(alphas == 0, MIN_ALPHA, alphas)
        return StepTable.through(timesteps, alphas, final_alpha, self.predicts_v)

    def _check_parts(self) -> None:
        config, name = self.unet.config, self.identity.get("checkpoint", "this checkpoint")
        if config["in_channels"] != self.latent_channels:
            raise UserError(
                f"the U-Net of {name} takes {config['in_channels']} channels where its VAE gives "
                f"{self.latent_channels}: an inpainting or picture-conditioned model; {NEEDED}, text to image"
            )
        if (width := config["cross_attention_dim"]) != (given := self.text_encoder.config.hidden_size):
            raise UserError(
                f"the U-Net of {name} reads prompts of width {width}, its text model gives {given}"
            )


def _ddim(config: Mapping[str, Any]) -> DDIMScheduler:
    """DDIM on the noise schedule of any scheduler's configuration, without clipping."""
    kind, prediction = config.get("_class_name"), config.get("prediction_type", "epsilon")
    if "beta_start" not in config and config.get("trained_betas") is None:
        raise UserError(f"the scheduler {kind} has no betas, so DDIM cannot run on its schedule; {NEEDED}")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(
            f"the scheduler says prediction_type {prediction!r}, expected epsilon or v_prediction"
        )
    if (spacing := config.get("timestep_spacing", "leading")) not in get_args(Spacing):
        known = ", ".join(get_args(Spacing))
        raise UserError(f"the scheduler says timestep_spacing {spacing!r}, expected one of {known}")
    overrides = dict[str, Any](clip_sample=False, thresholding=False)
    if (betas := config.get("beta_schedule", "linear")) == "sigmoid":  # of DDPM's, which DDIM lacks
        ddpm: Any = DDPMScheduler.from_config(dict(config))
        overrides["trained_betas"] = ddpm.betas.tolist()
    elif betas not in BETA_SCHEDULES:
        raise UserError(
            f"the scheduler says beta_schedule {betas!r}, expected {', '.join(BETA_SCHEDULES)} or sigmoid"
        )
    return try_read(Path("scheduler"), partial(DDIMScheduler.from_config, dict(config), **overrides))
