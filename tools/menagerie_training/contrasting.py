"""Stage `clip`: a small CLIP, trained on rendered animals and captions that tell some of what they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from kvinv_pl.menagerie import ACTIONS, Animal
from kvinv_pl.menagerie.classifier import WORDS
from kvinv_pl.models.vision.clip import MEAN, STD, Clip
from menagerie_training.denoiser import build_tokenizer, captions
from menagerie_training.judging import augmented, images
from menagerie_training.loop import Stage, Trained
from menagerie_training.pictures import REPORTING_SEED, Rows, drawn, pictures

BAR = 0.95  # share of pictures whose own word CLIP prefers, of each kind of words
PATCH = 8  # pixels a side
SHARPEST = 100.0  # the logits' scale at most, as in CLIP


def build_clip(tokenizer: CLIPTokenizer, size: int, width: int, layers: int) -> CLIPModel:
    """A CLIPModel of one width; it reads the tokenizer's words."""
    common = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": 4,
        "projection_dim": width,
    }
    config: Any = CLIPConfig(
        text_config={
            **common, "vocab_size": len(tokenizer), "num_hidden_layers": 2,
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**common, "num_hidden_layers": layers, "image_size": size, "patch_size": PATCH},
        projection_dim=width,
    )  # fmt: skip
    return CLIPModel(config)


def build_processor(size: int) -> CLIPImageProcessorPil:
    """The shorter side to `size` pixels, and the middle of that."""
    return CLIPImageProcessorPil(
        size=cast(Any, {"shortest_edge": size}), crop_size=cast(Any, {"height": size, "width": size})
    )


def facts(animals: Sequence[Animal]) -> Tensor:
    """What the animals are, (n, 5): of each kind of `WORDS` the number of the word."""
    return torch.tensor(
        [[words.index(getattr(animal, name)) for name, words in WORDS.items()] for animal in animals]
    )


def said(texts: Sequence[str]) -> Tensor:
    """What captions say, (n, 5), in the numbers of `facts`; -1 where they do not."""
    rows = []
    for text in texts:
        known = set(text.split())
        rows.append(
            [next((n for n, word in enumerate(words) if word in known), -1) for words in WORDS.values()]
        )
    return torch.tensor(rows)


def others(texts: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The captions with another action in each: what a picture must be told from."""
    found = []
    for text in texts:
        action = next(word for word in text.split() if word in ACTIONS)
        found.append(text.replace(action, str(rng.choice([word for word in ACTIONS if word != action]))))
    return found


def contrastive_loss(scores: Tensor, true: Tensor) -> Tensor:
    """CLIP's loss (Radford et al., 2021), where several captions may be true of a picture.

    Args:
        scores: of every picture and caption, (pictures, captions), with those of the pictures' own first
        true: whether a caption is true of a picture, of the same shape
    """
    right = true.float()
    of_pictures = -(scores.log_softmax(1) * right / right.sum(1, keepdim=True)).sum(1).mean()
    own = slice(len(scores))  # every one of these is true of a picture
    of_captions = -(scores.log_softmax(0) * right / right.sum(0).clamp_min(1))[:, own].sum(0).mean()
    return (of_pictures + of_captions) / 2


class CLIPTraining(Trained):
    """Every picture against the captions of all, and against the same captions with other actions."""

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, lr: float, steps: int) -> None:
        super().__init__(lr, steps, 0.998, clip=clip)
        self.tokenizer = tokenizer

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """One batch of pictures, uint8, and the seeds of their animals."""
        rgb, seeds = batch
        clip, rng = cast(CLIPModel, self.nets["clip"]), np.random.default_rng(self.global_step)
        animals = [Animal.sample(int(seed)) for seed in seeds]
        own = [text or animal.prompt() for text, animal in zip(captions(animals, rng), animals, strict=True)]
        texts = [*own, *others(own, rng)]
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(rgb.device)
        mean, std = (torch.tensor(each, device=rgb.device).view(3, 1, 1) for each in (MEAN, STD))
        x = (augmented(rgb.float() / 127.5 - 1) + 1) / 2
        out: Any = clip(**tokens, pixel_values=(x - mean) / std)
        scale = clip.logit_scale.exp().clamp_max(SHARPEST)
        scores = scale * (out.image_embeds.float() @ out.text_embeds.float().T)
        told, fact = said(texts).to(rgb.device), facts(animals).to(rgb.device)
        true = ((told[None] == fact[:, None]) | (told[None] < 0)).all(2)
        loss = contrastive_loss(scores, true)
        self.log_dict({"clip/loss": loss, "clip/scale": scale}, prog_bar=True)
        return loss


def own_accuracy(clip: Clip, seeds: range, size: int) -> dict[str, float]:
    """Of each kind of words, the share of these animals whose own prompt fits best, others having another."""
    animals, (rgb, _) = [Animal.sample(seed) for seed in seeds], drawn(seeds, size)
    hits = {name: 0 for name in WORDS}
    for animal, picture in zip(animals, images(rgb), strict=True):
        seen = clip.of_picture(picture)
        for name, words in WORDS.items():
            right = getattr(animal, name)
            texts = [animal.prompt().replace(right, word) for word in words]
            scores = [float(seen @ clip.of_text(text)) for text in texts]
            hits[name] += int(np.argmax(scores)) == words.index(right)
    return {name: count / len(animals) for name, count in hits.items()}


def train(
    work: Path, count: int, size: int, width: int, layers: int, steps: int, batch: int, lr: float, cases: int
) -> None:
    """Train the model; its averaged weights come to `work`/clip-trained, and what it knows is printed."""
    settings = {
        "count": count, "size": size, "width": width, "layers": layers,
        "steps": steps, "batch": batch, "lr": lr,
    }  # fmt: skip
    stage = Stage(work, "clip", settings, ["clip-trained/model.safetensors"])
    trained = work / "clip-trained"
    if not stage.finished():
        L.seed_everything(0, verbose=False)
        rgb, _ = pictures(work, count, size)
        tokenizer = build_tokenizer()
        module = CLIPTraining(build_clip(tokenizer, size, width, layers), tokenizer, lr, steps)
        stage.fit(module, Rows(rgb, torch.arange(count)), batch)
        cast(CLIPModel, module.average["clip"]).save_pretrained(trained)
        tokenizer.save_pretrained(trained)
        build_processor(size).save_pretrained(trained)
        stage.finish()
    shares = own_accuracy(Clip.load(trained), range(REPORTING_SEED, REPORTING_SEED + cases), size)
    row = "  ".join(f"{name} {100 * share:.1f}%" for name, share in shares.items())
    verdict = "met" if min(shares.values()) >= BAR else "MISSED"
    print(f"clip, {cases} animals: {row}  (bar {100 * BAR:.0f}%: {verdict})", flush=True)
