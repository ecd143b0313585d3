"""Stage `vae`: the autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from menagerie_training.loop import Stage, Trained
from menagerie_training.pictures import Rows, pictures, unit


def build_vae(size: int, channels: tuple[int, ...], latent_channels: int) -> AutoencoderKL:
    """An AutoencoderKL whose factor is 2 ** (levels - 1)."""
    levels, widths = len(channels), cast(Any, channels)
    return AutoencoderKL(
        down_block_types=cast(Any, ("DownEncoderBlock2D",) * levels),
        up_block_types=cast(Any, ("UpDecoderBlock2D",) * levels),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=size,
    )


def gradient_loss(a: Tensor, b: Tensor) -> Tensor:
    """L1 between the differences of neighbouring pixels: what keeps stripes apart."""
    d = a - b
    return (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


class VAETraining(Trained):
    """L2, L1 and gradient loss on what is decoded, and a little KL; the animal counts double."""

    def __init__(self, vae: AutoencoderKL, lr: float, steps: int, kl: float) -> None:
        """`kl` weighs the Kullback-Leibler term, per picture."""
        super().__init__(lr, steps, 0.998, vae=vae)
        self.kl = kl

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """One batch of pictures and masks, uint8."""
        rgb, mask = batch
        x, vae = unit(rgb), cast(Any, self.nets["vae"])
        posterior = vae.encode(x, return_dict=False)[0]
        y = vae.decode(posterior.sample(), return_dict=False)[0].float()
        error = (y - x) * (1.0 + mask.float())  # the animal is a fifth of the frame and what edits are about
        loss = error.square().mean() * 4 + error.abs().mean() + gradient_loss(y, x)
        loss = loss + self.kl * posterior.kl().mean()
        figures = {"vae/loss": loss, "vae/psnr": 10 * torch.log10(4 / (y - x).square().mean())}
        self.log_dict(figures, prog_bar=True)
        return loss


@torch.no_grad()
def means(vae: Any, rgb: Tensor) -> Tensor:
    """Posterior means, unscaled, of pictures of 0..255."""
    parts = [vae.encode(unit(part).to(vae.device), return_dict=False)[0].mean.cpu() for part in rgb.split(50)]
    return torch.cat(parts)


@torch.no_grad()
def round_trip(vae: Any, rgb: Tensor) -> Tensor:
    """Pictures of 0..255 encoded and decoded, in -1..1."""
    latents = (means(vae, part).to(vae.device) for part in rgb.split(50))
    parts = [vae.decode(z, return_dict=False)[0].cpu() for z in latents]
    return torch.cat(parts).clamp(-1, 1)


def train(
    work: Path, count: int, size: int, channels: tuple[int, ...], latent_channels: int,
    steps: int, batch: int, lr: float, kl: float,
) -> None:  # fmt: skip
    """Train the autoencoder; its averaged weights come to `work`/vae-trained."""
    settings = {
        "count": count, "size": size, "channels": channels, "latent_channels": latent_channels,
        "steps": steps, "batch": batch, "lr": lr, "kl": kl,
    }  # fmt: skip
    stage = Stage(work, "vae", settings, ["vae-trained/diffusion_pytorch_model.safetensors"])
    if stage.finished():
        return
    L.seed_everything(0, verbose=False)
    rgb, mask = pictures(work, count, size)
    module = VAETraining(build_vae(size, channels, latent_channels), lr, steps, kl)
    stage.fit(module, Rows(rgb, mask), batch)
    trained = cast(AutoencoderKL, module.average["vae"].eval())
    trained.register_to_config(scaling_factor=round(1 / means(trained, rgb[:1000]).std().item(), 5))
    trained.save_pretrained(work / "vae-trained")
    stage.finish()
