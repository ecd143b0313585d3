"""Train the embedded model: pictures, then the autoencoder, then the U-Net with its text encoder, then the judge.

Each stage is a command of its own, is resumed by giving it again, and leaves what the next one reads in `--work`:

    python tools/train_menagerie.py vae
    python tools/train_menagerie.py unet
    python tools/train_menagerie.py judge
    python tools/train_menagerie.py export --to kvinv_pl/menagerie/weights
    python tools/train_menagerie.py report

The same commands use a GPU where there is one. Training seeds are 0 to 899,999; the report uses 1,000,000 and up.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from kvinv_pl.menagerie import SIZE, Animal

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
FIRST_REPORTING_SEED = 1_000_000
LAST_TRAINING_SEED = 899_999


# ---------------------------------------------------------------------------------------------------- pictures


def _draw(job: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    first, last, size = job
    animals = [Animal.sample(seed) for seed in range(first, last)]
    pictures = np.stack([np.asarray(animal.render(size=size)) for animal in animals])
    return pictures, np.stack([np.asarray(animal.mask(size=size)) for animal in animals])


def pictures(work: Path, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, size, size) and masks (count, 1, size, size), uint8, of the first `count` training seeds."""
    file = work / f"pictures-{count}-{size}.pt"
    if not file.exists():
        work.mkdir(parents=True, exist_ok=True)
        jobs = [(first, min(first + 500, count), size) for first in range(0, count, 500)]
        with ProcessPoolExecutor() as pool:
            parts = list(pool.map(_draw, jobs))
        rgb, mask = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
        torch.save((rgb.permute(0, 3, 1, 2).contiguous(), mask[:, None].to(torch.uint8)), file)
    return torch.load(file, mmap=True)


def unit(rgb: Tensor) -> Tensor:
    """From 0..255 to -1..1."""
    return rgb.float() / 127.5 - 1.0


class Rows(Dataset):
    """Rows of tensors that lie in memory."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        return [tensor[rows] for tensor in self.tensors]


def loader(rows: Rows, batch: int) -> DataLoader:
    """Batches of random rows, without end."""
    return DataLoader(rows, batch, sampler=RandomSampler(rows, num_samples=10**9), collate_fn=lambda b: b)


# -------------------------------------------------------------------------------------------------------- vae


def build_vae(size: int, channels: list[int], latent_channels: int) -> nn.Module:
    """An AutoencoderKL whose factor is 2 ** (levels - 1)."""
    from diffusers import AutoencoderKL

    levels = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=size,
    )


def gradient_loss(a: Tensor, b: Tensor) -> Tensor:
    """L1 between the differences of neighbouring pixels: what keeps stripes apart."""
    d = a - b
    return (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


class Trained(L.LightningModule):
    """What the stages share: AdamW with warm-up and cosine, and an exponential moving average of the weights."""

    def __init__(self, lr: float, steps: int, decay: float) -> None:
        super().__init__()
        self.lr, self.steps, self.decay = lr, steps, decay

    def keep_average_of(self, **nets: nn.Module) -> None:
        self.nets = nn.ModuleDict(nets)
        self.average = copy.deepcopy(self.nets).requires_grad_(False)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.nets.parameters(), self.lr, weight_decay=1e-2, betas=(0.9, 0.99))
        warm = min(200, self.steps // 10 + 1)

        def rate(step: int) -> float:
            done = min(1.0, max(0.0, (step - warm) / max(1, self.steps - warm)))
            return min(1.0, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        decay = min(self.decay, (1 + self.global_step) / (10 + self.global_step))
        mine, theirs = list(self.nets.parameters()), list(self.average.parameters())
        torch._foreach_lerp_(theirs, mine, 1 - decay)


class VAETraining(Trained):
    def __init__(self, vae: nn.Module, lr: float, steps: int, kl: float) -> None:
        super().__init__(lr, steps, 0.998)
        self.kl = kl
        self.keep_average_of(vae=vae)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        rgb, mask = batch
        x = unit(rgb)
        posterior = self.nets["vae"].encode(x).latent_dist
        y = self.nets["vae"].decode(posterior.sample()).sample.float()
        error = (y - x) * (1.0 + mask.float())  # the animal is a fifth of the frame and what edits are about
        loss = error.square().mean() * 4 + error.abs().mean() + gradient_loss(y, x) + self.kl * posterior.kl().mean()
        self.log_dict({"vae/loss": loss, "vae/psnr": 10 * torch.log10(4 / (y - x).square().mean())}, prog_bar=True)
        return loss


def trainer(work: Path, stage: str, steps: int) -> L.Trainer:
    return L.Trainer(
        accelerator="auto", devices=1, precision="bf16-mixed", max_steps=steps, max_epochs=-1,
        logger=TensorBoardLogger(work / "logs", name=stage, version=""),
        callbacks=[
            ModelCheckpoint(work / stage, "last", every_n_train_steps=200, save_top_k=1, enable_version_counter=False),
            TQDMProgressBar(refresh_rate=50),
        ],
        gradient_clip_val=1.0, enable_model_summary=False, log_every_n_steps=20, use_distributed_sampler=False,
    )  # fmt: skip


def fit(module: Trained, rows: Rows, batch: int, work: Path, stage: str) -> None:
    last = work / stage / "last.ckpt"
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    trainer(work, stage, module.steps).fit(module, loader(rows, batch), ckpt_path=last if last.exists() else None)


def vae(
    work: Path = Path("work_menagerie"),
    count: int = 60_000,
    size: int = SIZE,
    channels: list[int] = [32, 64, 64],  # noqa: B006
    latent_channels: int = 8,
    steps: int = 4000,
    batch: int = 16,
    lr: float = 1e-3,
    kl: float = 1e-6,
) -> None:
    """Train the autoencoder and save its averaged weights under `work`/vae-trained.

    Args:
        work: where pictures, checkpoints, logs and results lie
        count: how many training pictures
        size: pixels a side
        channels: width at each level; the factor is 2 ** (levels - 1)
        latent_channels: channels of a latent
        steps: training steps
        batch: pictures a step
        lr: highest learning rate
        kl: weight of the Kullback-Leibler term, per picture
    """
    L.seed_everything(0, verbose=False)
    rows = Rows(*pictures(work, count, size))
    module = VAETraining(build_vae(size, channels, latent_channels), lr, steps, kl)
    fit(module, rows, batch, work, "vae")
    trained = module.average["vae"].eval()
    with torch.no_grad():
        z = torch.cat([trained.encode(unit(rows.tensors[0][i : i + 50])).latent_dist.mean for i in range(0, 1000, 50)])
    trained.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    trained.save_pretrained(work / "vae-trained")



# ------------------------------------------------------------------------------------------------- unet and text


def captions(animals: list[Animal], rng: np.random.Generator) -> list[str]:
    """What different people would say of these pictures; one in ten says nothing (for guidance)."""

    def caption(animal: Animal) -> str:
        if rng.uniform() < 0.1:
            return ""
        if rng.uniform() < 0.55:
            return animal.prompt()
        keep = rng.uniform(size=3) < 0.6
        words = [word for word, kept in zip((animal.coat, animal.colour), keep[:2], strict=True) if kept]
        if rng.uniform() < 0.15:  # a word that the world does not know says nothing
            words.insert(0, "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(2, 7)))))
        verb = str(rng.choice(["", "is ", "that is "], p=[0.8, 0.1, 0.1])) + animal.action
        text = " ".join(["a", *words, animal.species, verb])
        if keep[2]:
            text += str(rng.choice([" on ", " on the "])) + animal.ground
        return str(rng.choice(["", "a photo of ", "a picture of ", "a drawing of "], p=[0.7, 0.1, 0.1, 0.1])) + text

    return [caption(animal) for animal in animals]


def build_tokenizer(work: Path) -> Any:
    """A CLIPTokenizer in which every word of the world is one token and any other word is spelled in bytes."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    rng = np.random.default_rng(0)
    animals = [Animal.sample(seed) for seed in range(3000)]
    words = [animal.prompt() for animal in animals] + ["a photo of the picture that is drawing"] * 300
    known = {word for text in words for word in text.split()}
    blank = CLIPTokenizer().backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=20, initial_alphabet=alphabet, end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"], show_progress=False,
    )  # fmt: skip
    blank.train_from_iterator(words + captions(animals, rng)[:0], learner)
    learned = json.loads(blank.to_str())["model"]
    vocab = learned["vocab"]
    for byte in alphabet:
        vocab.setdefault(byte + "</w>", len(vocab))
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=32)
    spelled = [word for word in known if len(tokenizer(word).input_ids) != 3]
    if spelled:
        raise RuntimeError(f"words of the world that are not one token: {spelled}")
    tokenizer.save_pretrained(work / "tokenizer")
    return tokenizer


def build_text_encoder(tokenizer: Any, width: int) -> nn.Module:
    """A two-layer CLIPTextModel."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def build_unet(size: int, latent_channels: int, channels: list[int], layers: int, text_width: int) -> nn.Module:
    """A U-Net with attention on all levels but the lowest."""
    from diffusers import UNet2DConditionModel

    levels = len(channels)
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        cross_attention_dim=text_width,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def build_scheduler() -> Any:
    """Stable Diffusion's own noise, as DDIM."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon",
    )  # fmt: skip


class UNetTraining(Trained):
    def __init__(self, unet: nn.Module, text: nn.Module, tokenizer: Any, lr: float, steps: int) -> None:
        super().__init__(lr, steps, 0.999)
        self.tokenizer = tokenizer
        self.keep_average_of(unet=unet, text=text)
        self.register_buffer("alphas", build_scheduler().alphas_cumprod, persistent=False)
        self.rng = np.random.default_rng()

    def on_fit_start(self) -> None:
        self.rng = np.random.default_rng(self.global_step)
        torch.manual_seed(self.global_step)
        if self.device.type == "cpu":  # twice as fast as the fused kernel's backward in bf16
            from diffusers.models.attention_processor import AttnProcessor

            self.nets["unet"].set_attn_processor(AttnProcessor())

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        z, seeds = batch
        texts = captions([Animal.sample(int(seed)) for seed in seeds], self.rng)
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        context = self.nets["text"](ids.to(z.device)).last_hidden_state
        t = torch.randint(0, len(self.alphas), (len(z),), device=z.device)
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(z)
        predicted = self.nets["unet"](alpha.sqrt() * z + (1 - alpha).sqrt() * noise, t, context).sample
        loss = (predicted.float() - noise).square().mean()
        self.log("unet/loss", loss, prog_bar=True)
        return loss


def latents(work: Path, count: int, size: int) -> Tensor:
    """Scaled latents of the training pictures, fp32."""
    from diffusers import AutoencoderKL

    file = work / f"latents-{count}-{size}.pt"
    if not file.exists():
        trained = AutoencoderKL.from_pretrained(work / "vae-trained").to("cuda" if torch.cuda.is_available() else "cpu")
        rgb, _ = pictures(work, count, size)
        with torch.no_grad():
            parts = [
                trained.encode(unit(rgb[i : i + 100]).to(trained.device)).latent_dist.mean.cpu()
                for i in range(0, count, 100)
            ]
        torch.save(torch.cat(parts) * trained.config.scaling_factor, file)
    return torch.load(file, mmap=True)


def unet(
    work: Path = Path("work_menagerie"),
    count: int = 60_000,
    size: int = SIZE,
    channels: list[int] = [64, 128, 192],  # noqa: B006
    layers: int = 1,
    text_width: int = 96,
    steps: int = 5000,
    batch: int = 64,
    lr: float = 1e-3,
) -> None:
    """Train the U-Net together with its text encoder and save the averages under `work`/unet-trained.

    Args:
        work: where the earlier stage's results lie
        count: how many training pictures
        size: pixels a side
        channels: width at each level
        layers: residual layers a block
        text_width: width of the text encoder
        steps: training steps
        batch: pictures a step
        lr: highest learning rate
    """
    L.seed_everything(0, verbose=False)
    z = latents(work, count, size)
    tokenizer = build_tokenizer(work)
    net = build_unet(z.shape[-1], z.shape[1], channels, layers, text_width)
    module = UNetTraining(net, build_text_encoder(tokenizer, text_width), tokenizer, lr, steps)
    fit(module, Rows(z, torch.arange(count)), batch, work, "unet")
    module.average["unet"].save_pretrained(work / "unet-trained")
    module.average["text"].save_pretrained(work / "text-trained")


if __name__ == "__main__":
    auto_cli({"vae": vae, "unet": unet}, as_positional=False)
