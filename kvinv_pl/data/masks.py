"""A mask of the subject from a file, fitted to its picture and shown over it."""

from __future__ import annotations

import os

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kvinv_pl.data.pictures import Geometry, Picture, read_picture, to_mask
from kvinv_pl.errors import UserError

TINT = (230, 30, 60)


def open_mask(path: str | os.PathLike[str]) -> Picture:
    """Read a mask as 8-bit grey, white on the subject, from any format of pictures; raises UserError.

    Where the file has transparency, the subject is what is opaque, otherwise what is bright. Files that hold
    0 and 1, or floats from 0 to 1, are read as black and white.
    """
    return read_picture(path, lambda image, notes: _grey(image))


def _grey(image: Image.Image) -> Image.Image:
    """A mask of any mode in 8 bits."""
    if image.has_transparency_data and not image.mode.startswith("I"):
        alpha = image.convert("RGBA").getchannel("A")
        if np.asarray(alpha).min() < 255:
            return alpha
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        brightest = next((end for end in (1, 255, 65535) if values.max() <= end), 0)
        if values.min() < 0 or not brightest:
            raise ValueError("its values are neither 0 to 1 nor of 8 or 16 bit")
        return Image.fromarray(np.round(values / brightest * 255).astype(np.uint8))
    grey = image.convert("L")
    return grey.point(lambda value: value * 255) if grey.getextrema()[1] == 1 else grey


def fitted(mask: Image.Image, geometry: Geometry, name: str) -> Float[Tensor, "h w"]:
    """The mask over the model's pixels, in 0..1; refused if it is empty, full or not of its picture's size.

    Args:
        mask: white on the subject, in the size of the whole picture.
        geometry: how the picture reaches the model.
        name: of the mask, in error messages.
    """
    if mask.size != geometry.original:
        expected, got = ("{}x{}".format(*size) for size in (geometry.original, mask.size))
        raise UserError(f"{name} is {got}, its picture is {expected} pixels: make both of one size")
    pixels = to_mask(mask, geometry)
    subject, crop = pixels > 0.5, "" if geometry.box is None else ", in the part of the picture that is used"
    if not subject.any():
        raise UserError(f"{name} is empty: expected white on the subject{crop}, got black everywhere")
    if subject.all():
        raise UserError(f"{name} is full: expected black around the subject{crop}, got white everywhere")
    return pixels


def shown(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with the subject tinted."""
    tinted = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, TINT), 0.6)
    return Image.composite(tinted, image.convert("RGB"), mask.convert("L"))
