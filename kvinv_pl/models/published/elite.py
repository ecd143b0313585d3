"""ELITE (Wei et al., 2023): its published mapping networks, which turn a picture into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.hub import resolve_file
from kvinv_pl.models.checkpoints.single_file import read_tensors
from kvinv_pl.models.vision.clip_encoder import filled, normalized, vision_encoder

GLOBAL, LOCAL = "ELITE's global_mapper.pt", "ELITE's local_mapper.pt"
VISION = "CLIP ViT-L/14 (openai/clip-vit-large-patch14/model.safetensors)"
LEVELS = 5  # the last hidden state of CLIP, and those after four of its layers
PUBLISHED_SIDE = 128  # pixels a side that masks are brought to before they are as coarse as the patches
MAPPING = "mapping_"  # what begins the names of the mapping's own layers; the others are keys and values


def _layers(before: int, hidden: int, after: int) -> nn.Sequential:
    def stage(wide: int) -> list[nn.Module]:
        return [nn.Linear(wide, hidden), nn.LayerNorm(hidden), nn.LeakyReLU()]

    return nn.Sequential(*stage(before), *stage(hidden), nn.Linear(hidden, after))


class _Mapping(nn.Module):
    """From CLIP's hidden states to words' vectors: of each level and patch one, with its class token's."""

    def __init__(self, before: int, hidden: int, after: int) -> None:
        super().__init__()
        for level in range(LEVELS):
            for name in (f"{MAPPING}{level}", f"{MAPPING}patch_{level}"):
                self.add_module(name, _layers(before, hidden, after))

    def forward(self, levels: Sequence[Float[Tensor, "tokens d"]]) -> Float[Tensor, "levels patches e"]:
        of_class, of_patches = (
            [self.get_submodule(f"{MAPPING}{which}{n}") for n in range(LEVELS)] for which in ("", "patch_")
        )
        each = zip(of_class, of_patches, levels, strict=True)
        return torch.stack([of(x[:1]) + of_patch(x[1:]) for of, of_patch, x in each])


class Elite:
    """The two mapping networks, of their authors' two files.

    Of the global one, w_0 alone stands in the prompt, as in its authors' sampling: the others are there for
    what is not to be kept.
    """

    def __init__(self, global_mapper: _Mapper, local_mapper: _Mapper) -> None:
        self.global_mapper, self.local_mapper = global_mapper, local_mapper

    @classmethod
    def load(cls, global_mapper: str, local_mapper: str, device: torch.device) -> Elite:
        """Load two files, or fetch them from the hub (owner/name/FILE).

        Of a pickle, tensors alone are read.
        """
        files = (global_mapper, GLOBAL), (local_mapper, LOCAL)
        return cls(*(_Mapper(read_tensors(resolve_file(*file)), *file, device) for file in files))

    @torch.no_grad()
    def word(self, encoder: Any, picture: Image.Image) -> Float[Tensor, "1 e"]:
        """w_0, the vector of the word that stands for what the picture shows; the encoder is CLIP's."""
        return self.global_mapper.mapping(_levels(encoder, picture))[0].mean(0, keepdim=True)

    @torch.no_grad()
    def local(self, encoder: Any, picture: Image.Image, mask: Image.Image) -> Float[Tensor, "patches e"]:
        """What the patches of the object say, of which those outside the mask, cut at half, say nothing."""
        white = mask.convert("L").point([0] * 128 + [255] * 128)
        shown = Image.composite(picture.convert("RGB"), Image.new("RGB", picture.size), white)
        found = self.local_mapper.mapping(_levels(encoder, shown)).mean(0)
        inside = torch.from_numpy(np.array(white) / 255).float()[None, None]
        for side in (PUBLISHED_SIDE, round(len(found) ** 0.5)):
            inside = F.interpolate(inside, (side, side), mode="nearest")
        return found * inside.flatten()[:, None].to(found)


def load_encoder(name: str, device: torch.device) -> Any:
    """CLIP's encoder of pictures, by a file or from the hub (owner/name/FILE)."""
    return vision_encoder(read_tensors(resolve_file(name, VISION)), name, VISION).to(device)


class _Mapper:
    """One file: a mapping, and W^K and W^V of every cross-attention."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str, needed: str, device: torch.device) -> None:
        self.name, self.needed = name, needed
        layers = {key: x for key, x in tensors.items() if key.startswith(MAPPING)}
        first, last = (layers.get(f"{MAPPING}0.{layer}.weight") for layer in (0, 6))
        if first is None or last is None:
            raise UserError(f"{name} has no weights {MAPPING}0.*; expected {needed}, give that")
        net = _Mapping(first.shape[1], first.shape[0], last.shape[0])
        self.mapping = filled(net, layers, name, needed).to(device)
        self._projections = {key: x.to(device) for key, x in tensors.items() if key not in layers}

    def projections(self, weights: Mapping[str, Tensor], paths: Sequence[str]) -> dict[str, Tensor]:
        """W^K and W^V for these cross-attentions of a U-Net, by the names of its own weights."""
        own = {
            # the dots of a path are underscores in the file
            f"{path.replace('.', '_')}_{name}.weight": f"{path}.{name}.weight"
            for path in paths
            for name in ("to_k", "to_v")
        }
        shapes = {key: x.shape for key, x in self._projections.items()}
        if shapes != {key: weights[name].shape for key, name in own.items()}:
            raise UserError(
                f"{self.name} has other cross-attentions than this model: expected {self.needed}, and Stable "
                "Diffusion 1.4 or one that was fine-tuned from it"
            )
        return {own[key]: x for key, x in self._projections.items()}


def _levels(encoder: Any, picture: Image.Image) -> list[Float[Tensor, "tokens d"]]:
    """CLIP's last hidden state, and those after a sixth, a third, half and two thirds of its layers."""
    side = int(encoder.config.image_size)
    square = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    out = encoder(normalized(square, encoder.device), output_hidden_states=True)
    depth = len(out.hidden_states) - 1
    among = [out.hidden_states[depth * share // 6][0] for share in range(1, LEVELS)]
    return [out.last_hidden_state[0], *among]
