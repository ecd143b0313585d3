"""Stage `judge`: the classifier, trained on true pictures and on their round trips, half and half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from kvinv_pl.menagerie import Animal
from kvinv_pl.menagerie.classifier import FILE, WORDS, Classifier, accuracy
from menagerie_training.autoencoder import round_trip
from menagerie_training.loop import Stage, Trained, needed
from menagerie_training.pictures import REPORTING_SEED, Rows, drawn, pictures, save, unit

TRUE_BAR, ROUND_TRIP_BAR = 0.99, 0.97


def bytes_of(pixels: Tensor) -> Tensor:
    """From -1..1 to 0..255, as a picture file holds it."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()


def images(rgb: Tensor) -> list[Image.Image]:
    """Pictures of 0..255, (n, 3, h, w), as PIL has them."""
    return [Image.fromarray(row.permute(1, 2, 0).contiguous().numpy()) for row in rgb]


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def augmented(x: Tensor) -> Tensor:
    """A little blur, colour and noise, none of it enough to change a word."""
    rows = (len(x), 1, 1, 1)
    kernel = torch.tensor([1.0, 2.0, 1.0], device=x.device) / 4
    soft = F.pad(x, (1, 1, 1, 1), mode="replicate")
    soft = F.conv2d(soft, torch.outer(kernel, kernel).expand(3, 1, 3, 3), groups=3)
    x = torch.lerp(x, soft, 0.6 * torch.rand(rows, device=x.device))
    gain = 1 + 0.03 * torch.randn(len(x), 3, 1, 1, device=x.device).clamp(-2, 2)
    x = x * gain + 0.04 * torch.randn(rows, device=x.device).clamp(-2, 2)
    return x + 0.05 * torch.rand(rows, device=x.device) * torch.randn_like(x)


class JudgeTraining(Trained):
    """Cross-entropy of every head, on each row's true picture or its round trip."""

    def __init__(self, lr: float, steps: int) -> None:
        super().__init__(lr, steps, 0.998, judge=Classifier())

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """One batch of true pictures, their round trips (both uint8) and the seeds of their animals."""
        true, trip, seeds = batch
        coin = torch.rand(len(true), 1, 1, 1, device=true.device) < 0.5
        scores = self.nets["judge"](augmented(unit(torch.where(coin, true, trip))))
        animals = [Animal.sample(int(seed)) for seed in seeds]
        losses = {}
        for name, words in WORDS.items():
            right = [words.index(getattr(animal, name)) for animal in animals]
            target = torch.tensor(right, device=true.device)
            losses[name] = F.cross_entropy(scores[name].float(), target, label_smoothing=0.02)
        loss = torch.stack(list(losses.values())).sum()
        self.log_dict({f"judge/{name}": value for name, value in losses.items()})
        self.log("judge/loss", loss, prog_bar=True)
        return loss


def round_trips(work: Path, vae: AutoencoderKL, trained: Path, rgb: Tensor) -> Tensor:
    """The round trips of the training pictures, uint8, made once."""
    file = work / f"round-trips-{len(rgb)}-{rgb.shape[-1]}.pt"
    if not file.exists() or file.stat().st_mtime < (trained / "config.json").stat().st_mtime:
        print(f"round trips of {len(rgb)} pictures", flush=True)
        save(bytes_of(round_trip(vae, rgb)), file)
    return torch.load(file, mmap=True)


def own_accuracy(judge: Classifier, vae: AutoencoderKL, cases: int, size: int) -> None:
    """Print the share of right words per head on reporting seeds, true and through the autoencoder."""
    seeds = range(REPORTING_SEED, REPORTING_SEED + cases)
    animals, (rgb, _) = [Animal.sample(seed) for seed in seeds], drawn(seeds, size)
    for what, pictures_, bar in (
        ("true pictures", rgb, TRUE_BAR),
        ("round trips", bytes_of(round_trip(vae, rgb)), ROUND_TRIP_BAR),
    ):
        shares = accuracy(judge, images(pictures_), animals)
        row = "  ".join(f"{name} {100 * share:.1f}%" for name, share in shares.items())
        verdict = "met" if min(shares.values()) >= bar else "MISSED"
        print(f"judge, {cases} {what}: {row}  (bar {100 * bar:.0f}%: {verdict})", flush=True)


def train(work: Path, count: int, size: int, steps: int, batch: int, lr: float, cases: int) -> None:
    """Train the judge; its averaged weights come to `work`/judge-trained, its accuracy is printed."""
    settings = {"count": count, "size": size, "steps": steps, "batch": batch, "lr": lr}
    stage = Stage(work, "judge", settings, [f"judge-trained/{FILE}"])
    trained = needed(work / "vae-trained" / "diffusion_pytorch_model.safetensors", "vae").parent
    vae: Any = AutoencoderKL.from_pretrained(trained)
    vae.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)
    if not stage.finished():
        L.seed_everything(0, verbose=False)
        rgb, _ = pictures(work, count, size)
        module = JudgeTraining(lr, steps)
        stage.fit(module, Rows(rgb, round_trips(work, vae, trained, rgb), torch.arange(count)), batch)
        (work / "judge-trained").mkdir(exist_ok=True)
        weights = {name: tensor.half().cpu() for name, tensor in module.average["judge"].state_dict().items()}
        save_file(weights, work / "judge-trained" / FILE, metadata={"format": "pt"})
        stage.finish()
    own_accuracy(Classifier.load(work / "judge-trained"), vae, cases, size)
