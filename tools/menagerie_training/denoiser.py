"""Stage `unet`: the U-Net and the text encoder, trained together on scaled latents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from kvinv_pl.menagerie import Animal, Twice, acting_otherwise
from menagerie_training.autoencoder import means
from menagerie_training.beginning import part, take_over, take_over_words
from menagerie_training.loop import Stage, Trained, needed
from menagerie_training.pairs import Known, Pairs, ReadingTheFirst, knowledge
from menagerie_training.pictures import NAMES, Rows, Sampling, Side, pictures, save


def captions(scenes: Sequence[Animal | Twice], rng: np.random.Generator, empty: float = 0.1) -> list[str]:
    """Varied captions of these pictures; a tenth, or another share, is empty (for guidance)."""

    def doing(animal: Animal, subject: str) -> str:
        return f"{subject} {rng.choice(['', 'is ', 'that is '], p=[0.8, 0.1, 0.1])}{animal.action}"

    def caption(scene: Animal | Twice) -> str:
        if rng.uniform() < empty:
            return ""
        if rng.uniform() < 0.55:
            return scene.prompt()
        animal = scene if isinstance(scene, Animal) else scene.first
        keep = rng.uniform(size=3) < 0.6
        words = [word for word, kept in zip((animal.coat, animal.colour), keep[:2], strict=True) if kept]
        if rng.uniform() < 0.15:  # a word that the world does not know says nothing
            words.insert(0, "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(2, 7)))))
        text = doing(animal, " ".join(["a", *words, animal.species]))
        if not isinstance(scene, Animal):
            relation = scene.relation if rng.uniform() < 0.7 else "and"
            text += f" {relation} " + doing(scene.second, f"the same {animal.species}")
        if keep[2]:
            text += str(rng.choice([" on ", " on the "])) + animal.ground
        openings = ["", "a photo of ", "a picture of ", "a drawing of "]
        return str(rng.choice(openings, p=[0.7, 0.1, 0.1, 0.1])) + text

    return [caption(scene) for scene in scenes]


@cache
def build_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer with one token for every word of the world; any other word is spelled in bytes."""
    from tokenizers import pre_tokenizers, trainers

    texts = [kind.sample(seed).prompt() for seed in range(3000) for kind in (Animal, Twice)]
    texts += ["a photo of the picture that is drawing"] * 300
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=20, initial_alphabet=alphabet, end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"], show_progress=False,
    )  # fmt: skip
    blank = CLIPTokenizer().backend_tokenizer
    blank.train_from_iterator(texts, learner)
    learned = json.loads(blank.to_str())["model"]
    vocab = learned["vocab"]
    for byte in alphabet:
        vocab.setdefault(byte + "</w>", len(vocab))
    merges: Any = [tuple(merge) for merge in learned["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=32)
    known = {word for text in texts for word in text.split()}
    if spelled := [word for word in known if len(tokenizer(word)["input_ids"]) != 3]:
        raise RuntimeError(f"words of the world that are not one token: {spelled}")
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    """A two-layer CLIPTextModel."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, projection_dim=width,
        bos_token_id=cast(int, tokenizer.bos_token_id), eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
    )  # fmt: skip
    return CLIPTextModel(config)


def build_unet(
    size: int, latent_channels: int, channels: tuple[int, ...], layers: int, text_width: int
) -> UNet2DConditionModel:
    """A U-Net with attention on all levels but the lowest."""
    levels = len(channels)
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        block_out_channels=channels,
        layers_per_block=layers,
        cross_attention_dim=text_width,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's own noise, as DDIM."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon",
    )  # fmt: skip


OWN_TOO = 0.2  # share of the steps in which seconds read themselves, too
AS_NOISY, CLEAN = 0.2, 0.4  # shares of the firsts that are as noisy as their seconds, and nearly clean
OTHERS = 0.5  # weight of the error of all but the seconds
MISSED = 0.05  # weight of how little the seconds read of what corresponds


def visited(rows: int, steps: int, device: torch.device) -> Tensor:
    """Times of 0 to `steps`, drawn with a density of 1.5 sqrt(t): the pose is decided at the noisy end."""
    return torch.rand(rows, device=device) ** (2 / 3) * steps


def alike(error: Tensor, alpha: Tensor) -> Tensor:
    """Errors of epsilon, one a row, so that all times count alike.

    Epsilon is nearly all of a noisy latent, so its error there is a tenth of that of a clean one, and the
    word of the action, which only tells there, would be learned last.
    """
    return error * (alpha + 0.01) ** -0.75


class UNetTraining(Trained):
    """The usual loss on epsilon, with captions drawn anew for every batch."""

    alphas: Tensor

    def __init__(
        self, unet: UNet2DConditionModel, text: CLIPTextModel, tokenizer: CLIPTokenizer, known: Known,
        lr: float, steps: int,
    ) -> None:  # fmt: skip
        super().__init__(lr, steps, 0.998, unet=unet, text=text)
        self.tokenizer = tokenizer
        self.register_buffer("alphas", build_scheduler().alphas_cumprod, persistent=False)
        self.rng = np.random.default_rng()
        self.reading, self.known = ReadingTheFirst(), known

    def on_train_start(self) -> None:
        """Seed the captions like the rest; let the self-attention of the decoder read across pairs."""
        super().on_train_start()
        self.rng = np.random.default_rng(self.global_step)
        unet, plain = cast(UNet2DConditionModel, self.nets["unet"]), AttnProcessor()
        # On a CPU, AttnProcessor is twice as fast as the fused kernel's backward in bf16.
        unet.set_attn_processor(
            {
                name: self.reading if name.startswith("up_blocks") and ".attn1." in name else plain
                for name in unet.attn_processors
            }
        )

    def training_step(self, batch: list[list[Tensor]], _: int) -> Tensor:
        """A batch of one animal twice, and one of pairs: scaled latents and the seeds of the animals."""
        (twice, twice_seeds), (firsts, seconds, seeds) = batch
        pairs = len(seeds)
        scenes: list[Animal | Twice] = [Twice.sample(seed) for seed in twice_seeds.tolist()]
        for sample in (Animal.sample, acting_otherwise):
            scenes += [sample(seed) for seed in seeds.tolist()]
        z = torch.cat([twice, firsts, seconds])
        texts = captions(scenes, self.rng)
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        context = self.nets["text"](cast(Tensor, ids).to(z.device)).last_hidden_state
        steps = self.alphas.shape[0]
        t = visited(len(z), steps, z.device)
        # The cleaner a first, the more its second gains by reading it.
        kind, share = torch.rand(2, pairs, device=z.device)
        cleaner = torch.where(kind < AS_NOISY, 1.0, torch.where(kind < AS_NOISY + CLEAN, 0.1 * share, share))
        t[-2 * pairs : -pairs] = t[-pairs:] * cleaner
        t = t.long().clamp(max=steps - 1)
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(z)
        known = self.known.of(seeds.cpu())
        self.reading.pairs = reading = Pairs(pairs, bool(self.rng.uniform() < OWN_TOO), known)
        predicted = self.nets["unet"](alpha.sqrt() * z + (1 - alpha).sqrt() * noise, t, context).sample
        squares = (predicted.float() - noise).square().mean(1)
        weight = torch.full_like(squares, OTHERS)
        weight[-pairs:] = known.weight.to(weight)
        weighted = alike((squares * weight).mean((1, 2)), alpha.flatten())
        self.log("unet/loss", squares.mean(), prog_bar=True)
        self.log("unet/firsts", weighted[-2 * pairs : -pairs].mean(), prog_bar=True)
        self.log("unet/seconds", weighted[-pairs:].mean(), prog_bar=True)
        missed = reading.missed()
        self.log("unet/missed", missed, prog_bar=True)
        return weighted.mean() + MISSED * missed


def latents(
    work: Path, count: int, size: int, sample: Sampling, vae: tuple[Path, Path] | None = None
) -> Tensor:
    """Scaled latents of the training pictures, fp32.

    Args:
        work: where pictures lie
        count: how many
        size: pixels a side
        sample: the scene of a seed
        vae: an autoencoder, and the folder in which its latents are kept; left out, that of the stage `vae`
    """
    if vae is None:
        vae = needed(work / "vae-trained" / "diffusion_pytorch_model.safetensors", "vae").parent, work
    trained, home = vae
    file = home / f"latents-{NAMES[sample]}-{count}-{size}.pt"
    if not file.exists() or file.stat().st_mtime < (trained / "config.json").stat().st_mtime:
        net: Any = AutoencoderKL.from_pretrained(trained)
        net.to("cuda" if torch.cuda.is_available() else "cpu")
        save(means(net, pictures(work, count, size, sample)[0]) * net.config["scaling_factor"], file)
    return torch.load(file, mmap=True)


def train(
    work: Path, count: int, size: int, channels: tuple[int, ...], layers: int, text_width: int,
    steps: int, batch: int, lr: float, begin: Path | None, processes: int,
) -> None:  # fmt: skip
    """Train the U-Net with its text encoder; their averages come to `work`/unet-trained and text-trained."""
    settings = {
        "count": count, "size": size, "channels": channels, "layers": layers, "text_width": text_width,
        "steps": steps, "batch": batch, "lr": lr, "begin": begin and begin.name,
    }  # fmt: skip
    weights = "unet-trained/diffusion_pytorch_model.safetensors"
    results = [weights, "text-trained/model.safetensors", "tokenizer/tokenizer.json"]
    stage = Stage(work, "unet", settings, results)
    if stage.finished():
        return
    L.seed_everything(0, verbose=False)
    twice, firsts, seconds = (
        latents(work, count, size, sample) for sample in (Twice.sample, Animal.sample, acting_otherwise)
    )
    seeds = torch.arange(count)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(work / "tokenizer")
    net = build_unet(firsts.shape[-1], firsts.shape[1], channels, layers, text_width)
    text = build_text_encoder(tokenizer, text_width)
    if begin:
        known = UNet2DConditionModel.from_pretrained(part(begin, "unet"))
        take_over(net, known.state_dict(), new_inputs=False)
        words = CLIPTokenizer.from_pretrained(part(begin, "tokenizer"))
        take_over_words(text, tokenizer, CLIPTextModel.from_pretrained(part(begin, "text_encoder")), words)
    grids = [firsts.shape[-1] >> level for level in range(len(channels) - 1)]
    module = UNetTraining(net, text, tokenizer, knowledge(work, count, grids), lr, steps)
    stage.fit(module, Side(Rows(twice, seeds), Rows(firsts, seconds, seeds)), batch, processes)
    if module.global_rank:
        return
    cast(UNet2DConditionModel, module.average["unet"]).save_pretrained(work / "unet-trained")
    cast(CLIPTextModel, module.average["text"]).save_pretrained(work / "text-trained")
    stage.finish()
