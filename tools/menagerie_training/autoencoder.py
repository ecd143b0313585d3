"""Stages `vae` and `decoder`: the autoencoder, and its decoder alone further."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import Twice
from menagerie_training.beginning import one_level_deeper, part, take_over, with_more_channels
from menagerie_training.loop import Stage, Trained, needed
from menagerie_training.pictures import Both, Rows, pictures, unit


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


def posterior(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and log-variances, fp32, of pictures of -1..1."""
    mean, logvar = vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)
    return mean, logvar.clamp(-30, 20)


def decoded(vae: Any, mean: Tensor, logvar: Tensor) -> Tensor:
    """The picture, fp32, of a sample of the posterior."""
    z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    return vae.decoder(vae.post_quant_conv(z)).float()


def picture_loss(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """L2, L1 and gradient loss; the animal, a fifth of the frame and what edits are about, counts double."""
    error = (y - x) * (1.0 + mask.float())
    return error.square().mean() * 4 + error.abs().mean() + gradient_loss(y, x)


class VAETraining(Trained):
    """The loss of what is decoded, and a little KL.

    With a teacher, the first channels of a latent are also tied to its means of the picture at half the size:
    what a U-Net has learned of them stays true.
    """

    TIE = 2.0  # weight of the tie to the teacher

    def __init__(
        self,
        vae: AutoencoderKL,
        lr: float,
        steps: int,
        kl: float,
        teacher: AutoencoderKL | None = None,
    ) -> None:
        """`kl` weighs the Kullback-Leibler term, per picture."""
        super().__init__(lr, steps, 0.998, vae=vae)
        self.kl = kl
        # in a list: no part of what is trained and saved
        self.teacher = [] if teacher is None else [teacher.eval().requires_grad_(False)]
        cast(Any, vae).to(memory_format=torch.channels_last)

    def on_train_start(self) -> None:
        """Bring the teacher to the device."""
        super().on_train_start()
        for teacher in self.teacher:
            cast(Any, teacher).to(self.device)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """One batch of pictures and masks, uint8."""
        rgb, mask = batch
        x = unit(rgb).contiguous(memory_format=torch.channels_last)
        # not compiled: in bf16, torch 2.13's inductor gives a CPU's encoder no gradient from the picture
        vae = cast(Any, self.nets["vae"])
        mean, logvar = posterior(vae, x)
        y = decoded(vae, mean, logvar)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum((1, 2, 3)).mean()
        loss = picture_loss(x, y, mask) + self.kl * kl
        figures = {"vae/loss": loss, "vae/psnr": 10 * torch.log10(4 / (y - x).square().mean())}
        for teacher in self.teacher:
            with torch.no_grad():
                taught = teacher.encode(F.avg_pool2d(x, 2), return_dict=False)[0].mean
            tie = (mean[:, : taught.shape[1]] - taught.float()).square().mean()
            figures["vae/tie"] = tie
            loss = loss + self.TIE * tie
        self.log_dict(figures, prog_bar=True)
        return loss


class DecoderTraining(Trained):
    """The loss of what is decoded, for the decoder alone: the latents stay those that a U-Net has learned."""

    def __init__(self, vae: AutoencoderKL, lr: float, steps: int) -> None:
        net = cast(Any, vae)
        net.encoder.requires_grad_(False)
        net.quant_conv.requires_grad_(False)
        super().__init__(lr, steps, 0.99, vae=vae)
        net.to(memory_format=torch.channels_last)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """One batch of pictures and masks, uint8."""
        rgb, mask = batch
        x = unit(rgb).contiguous(memory_format=torch.channels_last)
        vae = cast(Any, self.nets["vae"])
        with torch.no_grad():
            mean, logvar = posterior(vae, x)
        y = decoded(vae, mean, logvar)
        loss = picture_loss(x, y, mask)
        psnr = 10 * torch.log10(4 / (y - x).square().mean())
        self.log_dict({"decoder/loss": loss, "decoder/psnr": psnr}, prog_bar=True)
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


def begun_from(vae: AutoencoderKL, checkpoint: Path) -> AutoencoderKL:
    """Give the net the weights of an autoencoder of one level less, which is returned as its teacher."""
    teacher = AutoencoderKL.from_pretrained(part(checkpoint, "vae")).float()
    expected, got = (
        (len(config["block_out_channels"]), config["latent_channels"], config["sample_size"])
        for config in (teacher.config, vae.config)
    )
    if expected[0] + 1 != got[0] or expected[1] > got[1] or 2 * expected[2] != got[2]:
        raise UserError(
            f"--begin {checkpoint} has {expected[0]} levels, {expected[1]} latent channels and {expected[2]} "
            f"pixels: expected one more of --channels, no fewer --latent_channels and twice the --size; "
            f"got {got[0]} levels, {got[1]} latent channels and {got[2]} pixels"
        )
    weights = one_level_deeper(teacher.state_dict(), expected[0])
    take_over(vae, with_more_channels(weights, vae.config["latent_channels"]))
    return teacher


@torch.no_grad()
def normalise_free_channels(vae: AutoencoderKL, tied: int, rgb: Tensor, scale: float) -> None:
    """Give the channels without a teacher mean 0 and deviation 1 / `scale`; the decoder undoes it."""
    z, net = means(vae, rgb), cast(Any, vae)
    shift = z[:, tied:].mean((0, 2, 3))
    gain = 1 / (scale * z[:, tied:].std((0, 2, 3)))
    quant, post = net.quant_conv, net.post_quant_conv
    for at, channel in enumerate(range(tied, z.shape[1])):
        quant.weight[channel] *= gain[at]
        quant.bias[channel] = (quant.bias[channel] - shift[at]) * gain[at]
        quant.bias[channel + z.shape[1]] += 2 * gain[at].log()  # log-variances
        post.bias += post.weight[:, channel, 0, 0] * shift[at]
        post.weight[:, channel] /= gain[at]


def train(
    work: Path, count: int, size: int, channels: tuple[int, ...], latent_channels: int,
    steps: int, batch: int, lr: float, kl: float, begin: Path | None,
) -> None:  # fmt: skip
    """Train the autoencoder; its averaged weights come to `work`/vae-trained."""
    settings = {
        "count": count, "size": size, "channels": channels, "latent_channels": latent_channels,
        "steps": steps, "batch": batch, "lr": lr, "kl": kl, "begin": begin and begin.name,
    }  # fmt: skip
    stage = Stage(work, "vae", settings, ["vae-trained/diffusion_pytorch_model.safetensors"])
    if stage.finished():
        return
    L.seed_everything(0, verbose=False)
    alone, twice = pictures(work, count, size), pictures(work, count, size, Twice.sample)
    vae = build_vae(size, channels, latent_channels)
    teacher = begun_from(vae, begin) if begin else None
    module = VAETraining(vae, lr, steps, kl, teacher)
    stage.fit(module, Both(Rows(*alone), Rows(*twice)), batch)
    trained = cast(AutoencoderKL, module.average["vae"].eval())
    some = torch.cat([alone[0][:500], twice[0][:500]])
    if teacher is None:
        scale = round(1 / means(trained, some).std().item(), 5)
    else:
        scale = teacher.config["scaling_factor"]
        normalise_free_channels(trained, teacher.config["latent_channels"], some, scale)
    trained.register_to_config(scaling_factor=scale)
    trained.save_pretrained(work / "vae-trained")
    stage.finish()


def train_decoder(work: Path, count: int, size: int, steps: int, batch: int, lr: float) -> None:
    """Train the decoder in `work`/vae-trained further; the whole comes to `work`/decoder-trained."""
    settings = {"count": count, "size": size, "steps": steps, "batch": batch, "lr": lr}
    stage = Stage(work, "decoder", settings, ["decoder-trained/diffusion_pytorch_model.safetensors"])
    if stage.finished():
        return
    trained = needed(work / "vae-trained" / "diffusion_pytorch_model.safetensors", "vae").parent
    L.seed_everything(0, verbose=False)
    alone, twice = pictures(work, count, size), pictures(work, count, size, Twice.sample)
    module = DecoderTraining(AutoencoderKL.from_pretrained(trained).float().train(), lr, steps)
    stage.fit(module, Both(Rows(*alone), Rows(*twice)), batch)
    cast(AutoencoderKL, module.average["vae"].eval()).save_pretrained(work / "decoder-trained")
    stage.finish()
