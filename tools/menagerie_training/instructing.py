"""Stage `instruct`: InstructPix2Pix (Brooks et al., 2023) of the drawn world, begun with a trained U-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix import (
    StableDiffusionInstructPix2PixPipeline,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from kvinv_pl.bench.renderers.instruct_pix2pix import InstructPix2Pix
from kvinv_pl.menagerie import Animal, acting_otherwise
from kvinv_pl.models.checkpoints.loading import quiet
from menagerie_training.beginning import part, take_over
from menagerie_training.denoiser import alike, build_scheduler, captions, latents, visited
from menagerie_training.exporting import clean
from menagerie_training.loop import Stage, Trained
from menagerie_training.pictures import Rows

DROPPED = 0.05  # share of the rows without words, without picture, and without both: Section 3.2.1


def widened(known: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same U-Net with room for a picture beside the noise, to which it is blind at first."""
    channels = 2 * known.config["out_channels"]
    net = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(known.config, in_channels=channels))
    take_over(net, known.state_dict(), new_inputs=False)
    return net


def dropped(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows have no words and which have no picture, by a number of 0 to 1 drawn for each."""
    return drawn < 2 * DROPPED, (drawn >= DROPPED) & (drawn < 3 * DROPPED)


class InstructTraining(Trained):
    """The loss on epsilon of one picture of a pair, beside the other's latents and under an instruction."""

    alphas: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scale: float,
        lr: float,
        steps: int,
    ) -> None:
        """`scale` is that of the latents: the picture's are encoded without it, as diffusers does."""
        super().__init__(lr, steps, 0.999, unet=unet)
        self.text = [text.eval().requires_grad_(False)]  # in a list: no part of what is trained and saved
        self.tokenizer, self.scale = tokenizer, scale
        self.register_buffer("alphas", build_scheduler().alphas_cumprod, persistent=False)
        self.rng = np.random.default_rng()

    def on_train_start(self) -> None:
        """Seed the captions like the rest; bring the text encoder to the device."""
        super().on_train_start()
        self.rng = np.random.default_rng(self.global_step)
        cast(Any, self.text[0]).to(self.device)
        cast(UNet2DConditionModel, self.nets["unet"]).set_attn_processor(AttnProcessor())

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """A batch of pairs, each either way round: scaled latents and the seeds of the animals."""
        firsts, seconds, seeds = batch
        back = torch.rand(len(seeds), device=seeds.device) < 0.5
        turned = back.view(-1, 1, 1, 1)
        source, z = torch.where(turned, seconds, firsts), torch.where(turned, firsts, seconds)
        scenes = [
            (Animal.sample if own else acting_otherwise)(seed)
            for own, seed in zip(back.tolist(), seeds.tolist(), strict=True)
        ]
        wordless, blind = dropped(torch.rand(len(z), device=z.device))
        context = self.read(scenes, wordless)
        t = visited(len(z), len(self.alphas), z.device).long().clamp(max=len(self.alphas) - 1)
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(z)
        seen = torch.where(blind.view(-1, 1, 1, 1), 0, source / self.scale)
        x = torch.cat([alpha.sqrt() * z + (1 - alpha).sqrt() * noise, seen], 1)
        error = (self.nets["unet"](x, t, context).sample.float() - noise).square().mean((1, 2, 3))
        self.log("instruct/loss", error.mean(), prog_bar=True)
        return alike(error, alpha.flatten()).mean()

    def read(self, scenes: list[Animal], wordless: Tensor) -> Tensor:
        """What is said to make of the source, read as the method reads it; (rows, length, width)."""
        told = [
            "" if without else InstructPix2Pix.instruction.format(source="", target=caption)
            for without, caption in zip(wordless.tolist(), captions(scenes, self.rng, empty=0), strict=True)
        ]
        ids = self.tokenizer(told, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        return self.text[0](cast(Tensor, ids).to(wordless.device)).last_hidden_state


def train(work: Path, count: int, steps: int, batch: int, lr: float, begin: Path) -> None:
    """Train from the checkpoint `begin`; a folder as diffusers saves it comes to `work`/instruct-trained."""
    settings = {"count": count, "steps": steps, "batch": batch, "lr": lr, "begin": begin.name}
    stage = Stage(work, "instruct", settings, ["instruct-trained/model_index.json"])
    if stage.finished():
        return
    L.seed_everything(0, verbose=False)
    vae = AutoencoderKL.from_pretrained(part(begin, "vae"))
    text = CLIPTextModel.from_pretrained(part(begin, "text_encoder")).float()
    tokenizer = CLIPTokenizer.from_pretrained(part(begin, "tokenizer"))
    net = widened(UNet2DConditionModel.from_pretrained(part(begin, "unet")))
    size, scale = vae.config["sample_size"], vae.config["scaling_factor"]
    firsts, seconds = (
        latents(work, count, size, sample, (part(begin, "vae"), work / "instruct"))
        for sample in (Animal.sample, acting_otherwise)
    )
    module = InstructTraining(net, text, tokenizer, scale, lr, steps)
    stage.fit(module, Rows(firsts, seconds, torch.arange(count)), batch)
    unet, nothing, trained = cast(Any, module.average["unet"]), cast(Any, None), work / "instruct-trained"
    with quiet():
        StableDiffusionInstructPix2PixPipeline(
            vae=vae, text_encoder=text.half(), tokenizer=tokenizer, unet=unet.half(),
            scheduler=cast(Any, build_scheduler()), safety_checker=nothing, feature_extractor=nothing,
            requires_safety_checker=False,
        ).save_pretrained(trained)  # fmt: skip
    clean(trained)
    stage.finish()
