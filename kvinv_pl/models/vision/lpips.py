"""LPIPS (Zhang et al., 2018): how far apart two pictures are to the eye, by SqueezeNet's features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.loading import REDOWNLOAD, try_read

NEEDED = "expected the file of torchvision's SqueezeNet 1.1, squeezenet1_1-b8a52dc0.pth"
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of -1..1, as LPIPS was calibrated
READ = (1, 4, 7, 9, 10, 11, 12)  # after which layers of the network features are compared
SMALLEST = 32  # pixels a side: below, nothing is left for the last layers


class _Fire(nn.Module):
    """A layer of SqueezeNet (Iandola et al., 2016)."""

    def __init__(self, before: int, squeezed: int, each: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(before, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, each, 1)
        self.expand3x3 = nn.Conv2d(squeezed, each, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1).relu()


def squeezenet() -> nn.Sequential:
    """The features of SqueezeNet 1.1, in torchvision's names."""
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool, _Fire(64, 16, 64), _Fire(128, 16, 64),
        pool, _Fire(128, 32, 128), _Fire(256, 32, 128),
        pool, _Fire(256, 48, 192), _Fire(384, 48, 192), _Fire(384, 64, 256), _Fire(512, 64, 256),
    )  # fmt: skip


class Lpips:
    """A frozen SqueezeNet, and the weight of every channel."""

    def __init__(self, features: nn.Sequential, weights: list[Float[Tensor, "1 _ 1 1"]]) -> None:
        self.features, self.weights = features.eval().requires_grad_(False), weights

    @classmethod
    def load(cls, file: str | Path, linear: Path, device: str | torch.device = "cpu") -> Lpips:
        """Load the network from a file of torchvision, and the channels' weights from one of LPIPS's."""
        place = Path(file).expanduser()
        if not place.is_file():
            raise UserError(f"there is no file {place}; {NEEDED}")
        state_dict = {
            name.removeprefix("features."): tensor
            for name, tensor in _read(place).items()
            if name.startswith("features.")
        }
        features = squeezenet()
        wanted = features.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
            raise UserError(f"{place} is another network; {NEEDED}")
        features.load_state_dict(state_dict)
        weights = [tensor.float().to(device) for _, tensor in sorted(_read(linear).items())]
        return cls(features.to(device), weights)

    @torch.no_grad()
    def distances(
        self, a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]
    ) -> list[Float[Tensor, "n 1 _ _"]]:
        """The weighted squared difference of the pictures' features, a map for every layer; of -1..1.

        LPIPS is the sum of the maps' means.
        """
        shift, scale = (torch.tensor(each, device=a.device).view(3, 1, 1) for each in (SHIFT, SCALE))
        x, maps = torch.cat([a, b]).sub(shift).div(scale), list[Tensor]()
        for n, layer in enumerate(self.features):
            x = layer(x)
            if n in READ:
                unit = x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()
                one, other = unit.chunk(2)
                maps.append(((one - other).square() * self.weights[len(maps)]).sum(1, keepdim=True))
        return maps


def spread(maps: list[Tensor], size: tuple[int, int]) -> Float[Tensor, "n 1 h w"]:
    """The sum of the maps, in the size (h, w) of the pictures."""
    return torch.stack([F.interpolate(each, size, mode="bilinear") for each in maps]).sum(0)


def _read(file: Path) -> Mapping[str, Tensor]:
    found = try_read(file, lambda: torch.load(file, map_location="cpu", weights_only=True))
    if not isinstance(found, Mapping):
        raise UserError(f"{file} has no weights by their names; {REDOWNLOAD}")
    return found
