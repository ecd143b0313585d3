"""A mask of the subject from a file, fitted to its picture and shown over it."""

import os

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from kvinv_pl.data.images.geometry import Geometry, to_image, to_mask
from kvinv_pl.data.images.pictures import Picture, read_picture
from kvinv_pl.errors import UserError

TINT = (230, 30, 60)
REMEDY = "paint it again, or have `kvinv mask` make one"


def open_mask(path: str | os.PathLike[str], invert: bool = False) -> Picture:
    """Read a mask as 8-bit grey, white on the subject, from any format of pictures; raises UserError.

    Where the file has transparency, the subject is what is opaque, otherwise what is bright. Of two values,
    whatever they are, the brighter one is the subject: annotation tools write labels, and colours for them.
    With `invert` it is the other way round.
    """

    def to_grey(image: Image.Image, notes: list[str]) -> Image.Image:
        grey = _grey(image)
        return ImageOps.invert(grey) if invert else grey

    return read_picture(path, to_grey)


def _grey(image: Image.Image) -> Image.Image:
    """A mask of any mode in 8 bits."""
    deep = image.mode.startswith(("I", "F"))
    alpha = None
    if image.has_transparency_data and not image.mode.startswith("I"):
        alpha = image.convert("RGBA").getchannel("A")
    values = np.asarray(image, dtype=np.float64) if deep else np.asarray(image.convert("L"))
    if alpha is not None and np.asarray(alpha).min() < 255:
        values = np.asarray(alpha)
    lowest, highest = values.min(), values.max()
    if lowest < highest and ((values == lowest) | (values == highest)).all():
        return Image.fromarray((values == highest).astype(np.uint8) * 255)
    if deep:
        brightest = next((end for end in (1, 255, 65535) if highest <= end), 0)
        if lowest < 0 or not brightest:
            raise ValueError("its values are neither 0 to 1 nor of 8 or 16 bit")
        values = np.round(values / brightest * 255)
    return Image.fromarray((values * (255 if highest == 1 and not deep else 1)).astype(np.uint8))


def fit_mask(mask: Image.Image, geometry: Geometry, name: str) -> Float[Tensor, "h w"]:
    """The mask over the model's pixels, in 0..1; refused if empty, full or not of its picture's size."""
    if mask.size != geometry.original:
        expected, got = ("{}x{}".format(*size) for size in (geometry.original, mask.size))
        raise UserError(f"{name} is {got}, its picture is {expected} pixels: make both the same size")
    pixels = to_mask(mask, geometry)
    subject, crop = pixels > 0.5, "" if geometry.box is None else ", in the part of the picture that is used"
    darkest, brightest = (round(float(value) * 255) for value in (pixels.min(), pixels.max()))
    if not subject.any():
        got = "black everywhere" if brightest == 0 else f"only values up to {brightest} of 255"
        raise UserError(f"{name} is empty: expected white on the subject{crop}, got {got}: {REMEDY}")
    if subject.all():
        got = "white everywhere" if darkest == 255 else f"only values from {darkest} of 255 up"
        raise UserError(f"{name} is full: expected black around the subject{crop}, got {got}: {REMEDY}")
    return pixels


def enlarge_mask(mask: Float[Tensor, "h w"], geometry: Geometry) -> Image.Image:
    """A mask of 0 to 1 in the model's size as one of the picture's, white from half on."""
    return to_image(mask.expand(3, -1, -1) * 2 - 1, geometry).convert("L").point([0] * 128 + [255] * 128)


def tint_subject(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Blend TINT over the white of the mask."""
    tinted = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, TINT), 0.6)
    return Image.composite(tinted, image.convert("RGB"), mask.convert("L"))
