"""FastComposer (Xiao et al., 2023): its published weights, and a picture among the words of a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.hub import resolve_file
from kvinv_pl.models.checkpoints.single_file import read_tensors
from kvinv_pl.models.vision.clip import MEAN, STD

NEEDED = "FastComposer's pytorch_model.bin"
HEAD = 64  # channels of an attention head, in every CLIP
OLD = "embeddings.position_ids"  # a buffer that transformers once saved


class _Layers(nn.Module):
    """Two linear layers after a norm; added to their input where they leave it its size."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(before)
        self.fc1, self.fc2 = nn.Linear(before, after), nn.Linear(after, after)

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc2(F.gelu(self.fc1(self.layernorm(x))))
        return out + x if out.shape == x.shape else out


class _Joined(nn.Module):
    """MLP(c || psi(s)): a word's embedding with that of a picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp1, self.mlp2 = _Layers(2 * width, width), _Layers(width, width)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, word: Tensor, picture: Tensor) -> Tensor:
        return self.layer_norm(self.mlp2(self.mlp1(torch.cat([word, picture], -1)) + word))


class FastComposer:
    """What one file of its authors has: a U-Net, CLIP's encoders, and what joins a word and a picture."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.name, self.tensors = name, tensors
        joint = self._part("postfuse_module")
        self.joined = self._filled(_Joined(len(joint["layer_norm.weight"])), joint).to(device)
        encoder_weights = self._part("image_encoder")
        self.encoder: Any = self._filled(_encoder(encoder_weights), encoder_weights).to(device)

    @classmethod
    def load(cls, name: str, device: torch.device) -> FastComposer:
        """Load a file, or fetch it from the hub (owner/name/FILE); of a pickle, tensors alone are read."""
        tensors = read_tensors(resolve_file(name, NEEDED))
        parts = ("unet.", "text_encoder.", "image_encoder.", "postfuse_module.layer_norm.")
        if lacking := [part for part in parts if not any(each.startswith(part) for each in tensors)]:
            raise UserError(f"{name} has no weights {lacking[0]}*; expected {NEEDED}, give that")
        return cls(name, tensors, device)

    def weights(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its weights of a part, unet or text_encoder, by the names of a network's own."""
        published = self._part(part)
        short_names = {name: name.removeprefix("text_model.") for name in tensors}
        expected = {short: tensors[name].shape for name, short in short_names.items()}
        if expected != {name: tensor.shape for name, tensor in published.items()}:
            raise UserError(
                f"{self.name} fits another {part} than this model has: its weights are of Stable Diffusion "
                "1.5; load that, or one that was fine-tuned from it"
            )
        return {name: published[short] for name, short in short_names.items()}

    @torch.no_grad()
    def join(self, word: Float[Tensor, " d"], picture: Image.Image) -> Float[Tensor, " d"]:
        """A word's embedding, as the text encoder gives it, with the whole picture in it."""
        side = int(self.encoder.config.image_size)
        square = ImageOps.pad(picture.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
        x = ((pixels - mean) / std)[None].to(self.encoder.device)
        return self.joined(word.float(), self.encoder(x).image_embeds[0]).to(word)

    def _part(self, name: str) -> dict[str, Tensor]:
        start = f"{name}."
        return {
            key.removeprefix(start): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(start) and not key.endswith(OLD)
        }

    def _filled(self, net: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
            raise UserError(f"{self.name} is another network; expected {NEEDED}, give that")
        net.load_state_dict(tensors)
        return net.float().eval().requires_grad_(False)


def _encoder(tensors: Mapping[str, Tensor]) -> CLIPVisionModelWithProjection:
    """CLIP's vision encoder in the size that its weights have."""
    start = "vision_model.embeddings."
    width, _, patch, _ = tensors[f"{start}patch_embedding.weight"].shape
    grid = math.isqrt(len(tensors[f"{start}position_embedding.weight"]))
    layers = [name for name in tensors if name.endswith("layer_norm1.weight")]
    config: Any = CLIPVisionConfig(
        hidden_size=width, patch_size=patch, image_size=grid * patch, num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // HEAD), projection_dim=len(tensors["visual_projection.weight"]),
        intermediate_size=len(tensors["vision_model.encoder.layers.0.mlp.fc1.weight"]),
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config)
