"""What a picture of the menagerie shows: a small classifier, and the nearest true picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import ACTIONS, COATS, COLOURS, GROUNDS, SPECIES, Animal, checkpoint

FILE = "judge.safetensors"  # next to the checkpoint's model_index.json
SIDE = 64  # pixels a side of the classifier's input, whatever the picture's own
WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"species": SPECIES, "colour": tuple(COLOURS), "coat": COATS, "action": ACTIONS, "ground": GROUNDS}
)
"""The five things that a prompt of the menagerie names, and the words for each."""


class _Block(nn.Module):
    """Half the side, then one residual layer."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(before, after, 3, 2, 1)
        self.down_norm = nn.GroupNorm(8, after)
        self.conv = nn.Conv2d(after, after, 3, 1, 1)
        self.norm = nn.GroupNorm(8, after)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.down_norm(self.down(x)))
        return x + F.silu(self.norm(self.conv(x)))


class Classifier(nn.Module):
    """Names species, colour, coat, action and ground: one linear head each on a convolutional net."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 5, 2, 2), nn.GroupNorm(8, 24), nn.SiLU(),
            _Block(24, 48), _Block(48, 80), _Block(80, 112), nn.Flatten(),
        )  # fmt: skip
        features = 112 * (SIDE // 16) ** 2
        self.heads = nn.ModuleDict({name: nn.Linear(features, len(words)) for name, words in WORDS.items()})

    @classmethod
    def load(cls, folder: Path | None = None) -> Classifier:
        """The trained judge next to a menagerie checkpoint (None: the embedded one)."""
        file = (checkpoint() if folder is None else Path(folder)) / FILE
        if not file.is_file():
            raise UserError(
                f"there is no judge {file}; tools/train_menagerie.py judge trains it, export puts it there"
            )
        classifier = cls()
        try:
            classifier.load_state_dict(load_file(file))
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{file} cannot be read as a judge: {reason}; export it again") from error
        return classifier.eval().requires_grad_(False)

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> dict[str, Float[Tensor, "n words"]]:
        """Scores of every head's words, for pixels in [-1, 1]."""
        if pixels.shape[-2:] != (SIDE, SIDE):
            pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
        features = self.body(pixels)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def names(self, pictures: Sequence[Image.Image]) -> list[dict[str, str]]:
        """What each picture shows, as `{"species": "cat", "colour": "red", ...}`; any sizes."""
        weight = next(self.parameters())
        labels = []
        for picture in pictures:
            rgb = torch.from_numpy(np.array(picture.convert("RGB"))).to(weight.device).permute(2, 0, 1)
            scores = self(rgb[None].to(weight.dtype) / 127.5 - 1)
            labels.append({name: WORDS[name][int(row.argmax())] for name, row in scores.items()})
        return labels


def accuracy(
    classifier: Classifier, pictures: Sequence[Image.Image], animals: Sequence[Animal]
) -> dict[str, float]:
    """For every head, the share of pictures that it names correctly (0 to 1)."""
    labels = classifier.names(pictures)
    right = {
        name: [word[name] == getattr(animal, name) for word, animal in zip(labels, animals, strict=True)]
        for name in WORDS
    }
    return {name: sum(hits) / max(1, len(hits)) for name, hits in right.items()}


def nearest_action(picture: Image.Image, animal: Animal) -> str:
    """The action whose true picture of this animal has the least mean squared error over the frame."""
    if picture.width != picture.height:
        size = f"{picture.width} x {picture.height}"
        raise UserError(f"a picture of the menagerie is square, got {size} pixels")
    rgb = np.asarray(picture.convert("RGB"), np.float32)

    def error(action: str) -> float:
        return float(np.square(rgb - np.asarray(animal.render(action, picture.width), np.float32)).mean())

    return min(ACTIONS, key=error)
