"""DINO's structure distance (Tumanyan et al., 2022): how the parts of a picture relate to one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import ViTModel

from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.loading import load_pretrained, quiet, require_type

NEEDED = "expected a DINO folder as transformers saves it (facebook/dino-vitb8, for one)"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
SIDE, LONGEST = 224, 480  # pixels that the shorter side is resized to, and what the longer may be


class Dino:
    """A frozen ViT, read at the keys of its last block."""

    def __init__(self, model: ViTModel) -> None:
        self.model = model.eval().requires_grad_(False)
        keys = [layer for name, layer in model.named_modules() if name.split(".")[-1] in ("k_proj", "key")]
        if not keys:
            raise UserError(f"this ViT has no keys of its own; {NEEDED}")
        self._keys: nn.Module = keys[-1]
        self.mean, self.std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Dino:
        """Load a folder as transformers saves it."""
        place = Path(folder).expanduser()
        require_type(place, "vit", NEEDED)
        with quiet():
            model = load_pretrained(ViTModel, place, dtype=torch.float32, add_pooling_layer=False)
        return cls(model.to(device))

    @torch.no_grad()
    def self_similarity(self, picture: Image.Image, levels: float = 1.0) -> Float[Tensor, "tokens tokens"]:
        """Cosines between the keys of every two tokens, of all heads together.

        `levels` is what white is before it is normalised: 1; PIE-Bench's published figures have 255.
        """
        rgb = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        pixels = rgb.float() / 255 * levels
        height, width = pixels.shape[-2:]
        scale = min(SIDE / min(height, width), LONGEST / max(height, width))
        size = max(1, int(height * scale)), max(1, int(width * scale))
        resized = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)
        x = ((resized - self.mean) / self.std).to(self.model.device)
        outputs: list[Tensor] = []

        def note(layer: nn.Module, given: Any, out: Any) -> None:
            outputs.append(out)

        with self._keys.register_forward_hook(note):
            self.model(x, interpolate_pos_encoding=True)
        keys = outputs[0][0].float()
        lengths = keys.norm(dim=1, keepdim=True)
        return keys @ keys.T / (lengths @ lengths.T).clamp_min(1e-8)

    def distance(self, a: Image.Image, b: Image.Image, levels: float = 1.0) -> float:
        """The mean squared difference of two pictures' self-similarities."""
        found = [self.self_similarity(picture, levels) for picture in (a, b)]
        return float((found[0] - found[1]).square().mean())
