"""FastComposer (Xiao et al., 2023): its published weights, and a picture among the words of a prompt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor, nn

from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.hub import resolve_file
from kvinv_pl.models.checkpoints.single_file import read_tensors
from kvinv_pl.models.vision.clip_encoder import filled, normalized, part, vision_encoder

NEEDED = "FastComposer's pytorch_model.bin"


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
        joint = part(tensors, "postfuse_module.")
        joined = _Joined(len(joint["layer_norm.weight"]))
        self.joined = filled(joined, joint, name, NEEDED).to(device)
        self.encoder = vision_encoder(part(tensors, "image_encoder."), name, NEEDED).to(device)

    @classmethod
    def load(cls, name: str, device: torch.device) -> FastComposer:
        """Load a file, or fetch it from the hub (owner/name/FILE); of a pickle, tensors alone are read."""
        tensors = read_tensors(resolve_file(name, NEEDED))
        parts = ("unet.", "text_encoder.", "image_encoder.", "postfuse_module.layer_norm.")
        if lacking := [part for part in parts if not any(each.startswith(part) for each in tensors)]:
            raise UserError(f"{name} has no weights {lacking[0]}*; expected {NEEDED}, give that")
        return cls(name, tensors, device)

    def weights(self, network: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its weights of a network, unet or text_encoder, by the names of the model's own."""
        published = part(self.tensors, f"{network}.")
        short_names = {name: name.removeprefix("text_model.") for name in tensors}
        expected = {short: tensors[name].shape for name, short in short_names.items()}
        if expected != {name: tensor.shape for name, tensor in published.items()}:
            raise UserError(
                f"{self.name} fits another {network} than this model has: its weights are of Stable "
                "Diffusion 1.5; load that, or one that was fine-tuned from it"
            )
        return {name: published[short] for name, short in short_names.items()}

    @torch.no_grad()
    def join(self, word: Float[Tensor, " d"], picture: Image.Image) -> Float[Tensor, " d"]:
        """A word's embedding, as the text encoder gives it, with the whole picture in it."""
        side = int(self.encoder.config.image_size)
        square = ImageOps.pad(picture.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
        x = normalized(square, self.encoder.device)
        return self.joined(word.float(), self.encoder(x).image_embeds[0]).to(word)
