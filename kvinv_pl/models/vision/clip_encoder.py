"""CLIP's vision encoder from a file's weights alone, in the size that they have."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from kvinv_pl.errors import UserError
from kvinv_pl.models.vision.clip import MEAN, STD

HEAD = 64  # channels of an attention head, in every CLIP
OLD = "embeddings.position_ids"  # a buffer that transformers once saved


def part(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """The weights whose names start so, without that start."""
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start) and not name.endswith(OLD)
    }


def filled(net: nn.Module, tensors: Mapping[str, Tensor], name: str, needed: str) -> Any:
    """The network with these weights, in fp32 and frozen; a UserError where they are another network's."""
    shapes = {key: tensor.shape for key, tensor in net.state_dict().items()}
    if shapes != {key: tensor.shape for key, tensor in tensors.items()}:
        raise UserError(f"{name} is another network; expected {needed}, give that")
    net.load_state_dict(tensors)
    return net.float().eval().requires_grad_(False)


def vision_encoder(tensors: Mapping[str, Tensor], name: str, needed: str) -> Any:
    """The CLIPVisionModelWithProjection of a CLIP's weights, vision_model.* and visual_projection.*."""
    start, own = "vision_model.embeddings.", ("vision_model.", "visual_projection.")
    tensors = {key: x for key, x in part(tensors, "").items() if key.startswith(own)}
    try:
        width, _, patch, _ = tensors[f"{start}patch_embedding.weight"].shape
        grid = math.isqrt(len(tensors[f"{start}position_embedding.weight"]))
        layers = [key for key in tensors if key.endswith("layer_norm1.weight")]
        config: Any = CLIPVisionConfig(
            hidden_size=width, patch_size=patch, image_size=grid * patch, num_hidden_layers=len(layers),
            num_attention_heads=max(1, width // HEAD),
            projection_dim=len(tensors["visual_projection.weight"]),
            intermediate_size=len(tensors["vision_model.encoder.layers.0.mlp.fc1.weight"]),
        )  # fmt: skip
    except KeyError as error:
        raise UserError(f"{name} has no weights {error.args[0]}; expected {needed}, give that") from None
    return filled(CLIPVisionModelWithProjection(config), tensors, name, needed)


def normalized(square: Image.Image, device: torch.device) -> Float[Tensor, "1 3 h w"]:
    """A picture in the encoder's size, as it takes it."""
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    return ((pixels - mean) / std)[None].to(device)
