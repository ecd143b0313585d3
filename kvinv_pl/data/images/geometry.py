"""From a picture to a model's pixels and back: sizes, crops, and how alike two pictures are."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kvinv_pl.errors import UserError

Mode = Literal["keep", "crop"]
"""Of a picture: its aspect kept, or its middle in the model's shape."""
LONGEST_RATIO = 8


@dataclass(frozen=True)
class Geometry:
    """From a picture to a model's pixels, all (w, h): `box` (l, t, r, b) is cut out, then resized."""

    original: tuple[int, int]
    resized: tuple[int, int]
    box: tuple[int, int, int, int] | None = None

    @property
    def result(self) -> tuple[int, int]:
        """The (w, h) of what `to_image` returns: the crop's, or the original's."""
        if self.box is None:
            return self.original
        left, top, right, bottom = self.box
        return right - left, bottom - top


def working_size(sample_size: tuple[int, int], side: int | None, multiple: int) -> tuple[int, int]:
    """Height and width that pictures are brought to: the checkpoint's, or with `side` as the shorter one."""
    if side is None:
        return sample_size
    if side < multiple:
        raise UserError(f"size: expected {multiple} pixels or more, got {side}")
    height, width = (round(length * side / min(sample_size)) for length in sample_size)
    return height, width


def fit_geometry(size: tuple[int, int], sample_size: tuple[int, int], multiple: int, mode: Mode) -> Geometry:
    """How a picture of `size` (w, h) reaches a model made for `sample_size` (h, w) pixels.

    Args:
        size: width and height of the picture.
        sample_size: height and width the checkpoint was made for.
        multiple: what both sides of the pixels have to be multiples of.
        mode: "keep" keeps the aspect, with the shorter side as the model has it, and results come back in the
            picture's size; "crop" takes the middle in the model's shape, and results are that crop.
    """
    width, height = size
    if max(size) > LONGEST_RATIO * min(size):
        raise UserError(f"the picture is {width}x{height}, expected at most {LONGEST_RATIO}:1: crop it first")

    def rounded(side: int | float) -> int:
        return max(1, int(side / multiple + 0.5)) * multiple

    if mode == "keep":
        scale = min(sample_size) / min(size)
        return Geometry(size, (rounded(width * scale), rounded(height * scale)))
    if mode != "crop":
        raise UserError(f"geometry: expected keep or crop, got {mode!r}")
    h, w = map(rounded, sample_size)
    scale = min(width / w, height / h)
    box_w, box_h = max(1, round(w * scale)), max(1, round(h * scale))
    left, top = (width - box_w) // 2, (height - box_h) // 2
    return Geometry(size, (w, h), (left, top, left + box_w, top + box_h))


def to_size(image: Image.Image, geometry: Geometry) -> Image.Image:
    """The picture in the size that the model takes."""
    return image.convert("RGB").resize(geometry.resized, Image.Resampling.LANCZOS, box=geometry.box)


def to_pixels(image: Image.Image, geometry: Geometry) -> Float[Tensor, "3 h w"]:
    """The picture as the model takes it, in -1 .. 1."""
    resized = to_size(image, geometry)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().contiguous() / 127.5 - 1


def as_pixels(image: Image.Image) -> Float[Tensor, "3 h w"]:
    """The picture in its own size, in -1 .. 1."""
    return to_pixels(image, Geometry(image.size, image.size))


def to_mask(image: Image.Image, geometry: Geometry) -> Float[Tensor, "h w"]:
    """A mask (white: the subject) that lies over the model's pixels, in 0 .. 1."""
    resized = image.convert("L").resize(geometry.resized, Image.Resampling.BILINEAR, box=geometry.box)
    return torch.from_numpy(np.array(resized)).float() / 255


def to_image(pixels: Float[Tensor, "3 h w"], geometry: Geometry) -> Image.Image:
    """The model's pixels (-1 .. 1, clamped) as a picture of the original's or the crop's size."""
    array = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    image = Image.fromarray(array.permute(1, 2, 0).contiguous().cpu().numpy())
    return image.resize(geometry.result, Image.Resampling.LANCZOS)


def psnr(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> float:
    """Peak signal-to-noise ratio in dB of two tensors of pixels in -1 .. 1; 100 where they are equal."""
    error = float((a.double() - b.double()).square().mean())
    return min(100.0, 10 * math.log10(4 / error)) if error > 0 else 100.0


def shared_colours(a: Image.Image, b: Image.Image) -> float:
    """The share of two pictures' colours that they have in common, in percent, wherever these are.

    That is the intersection of their histograms (Swain & Ballard, 1991), of 8 levels a channel.
    """
    one, other = (
        np.histogramdd(np.asarray(picture).reshape(-1, 3), bins=8, range=[(0, 256)] * 3)[0]
        for picture in (a, b)
    )
    return 100 * float(np.minimum(one / one.sum(), other / other.sum()).sum())
