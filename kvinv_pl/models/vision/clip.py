"""CLIP: how well a picture agrees with a text, and with another picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from kvinv_pl import menagerie
from kvinv_pl.models.checkpoints.loading import load_json, load_pretrained, quiet, require_type, try_read

NEEDED = "expected a CLIP folder as transformers saves it (openai/clip-vit-large-patch14), or menagerie"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own


class Clip:
    """A frozen CLIPModel and its tokenizer."""

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        config: Any = model.config
        self.size = int(config.vision_config.image_size)
        self._length = int(config.text_config.max_position_embeddings)
        self.mean, self.std = (torch.tensor(each).view(3, 1, 1) for each in (mean, std))

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Clip:
        """Load a folder as transformers saves it, or "menagerie", the one of the embedded world."""
        place = menagerie.clip() if str(folder) == "menagerie" else Path(folder).expanduser()
        require_type(place, "clip", NEEDED)
        with quiet():
            model = load_pretrained(CLIPModel, place, dtype=torch.float32)
            tokenizer = try_read(place, lambda: CLIPTokenizer.from_pretrained(place))
        file = place / "preprocessor_config.json"
        how = load_json(file) if file.is_file() else {}
        mean, std = how.get("image_mean", MEAN), how.get("image_std", STD)
        return cls(model.to(device), tokenizer, tuple(mean), tuple(std))

    @torch.no_grad()
    def of_text(self, text: str) -> Float[Tensor, " d"]:
        """A text's direction."""
        tokens = self.tokenizer(text, truncation=True, max_length=self._length, return_tensors="pt")
        found = self.model.get_text_features(tokens["input_ids"].to(self.model.device))
        return _direction(found)

    @torch.no_grad()
    def of_picture(self, picture: Image.Image) -> Float[Tensor, " d"]:
        """A picture's direction: the shorter side is resized, and the middle is taken."""
        rgb = picture.convert("RGB")
        scale = self.size / min(rgb.size)
        width, height = (max(self.size, round(side * scale)) for side in rgb.size)
        resized = rgb.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        middle = np.array(resized.crop((left, top, left + self.size, top + self.size)))
        pixels = torch.from_numpy(middle).permute(2, 0, 1).float() / 255
        x = ((pixels - self.mean) / self.std)[None].to(self.model.device)
        return _direction(self.model.get_image_features(x))

    def score(self, picture: Image.Image, text: str) -> float:
        """The CLIP score of Hessel et al. (2021): 100 max(cos, 0)."""
        return 100 * max(0.0, float(self.of_picture(picture) @ self.of_text(text)))


def _direction(found: Any) -> Float[Tensor, " d"]:
    """The one row of features, of length 1, wherever a version of transformers has it."""
    features = found if isinstance(found, Tensor) else found.pooler_output
    return torch.nn.functional.normalize(features[0].float().cpu(), dim=0)
