"""A mask of the subject: from a file, or from where the model itself looks for a word of the prompt."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kvinv_pl import pictures
from kvinv_pl.backbone import Backbone
from kvinv_pl.crossattention import cross_attentions, watching
from kvinv_pl.errors import UserError

SHARES = (0.2, 0.4, 0.6)  # of the noise schedule, where a word is looked for
START = (0,)  # the prompt's first token, to compare with
TINT = (230, 30, 60)


def open_mask(path: str | os.PathLike[str]) -> pictures.Picture:
    """Read a mask as 8-bit grey, white on the subject, from any format of pictures; raises UserError.

    Where the file has transparency, the subject is what is opaque, otherwise what is bright. Files that hold
    0 and 1, or floats from 0 to 1, are read as black and white.
    """
    return pictures.read_picture(path, lambda image, notes: _grey(image))


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


def fitted(mask: Image.Image, geometry: pictures.Geometry, name: str) -> Float[Tensor, "h w"]:
    """The mask over the model's pixels, in 0..1; refused if it is empty, full or not of its picture's size.

    Args:
        mask: white on the subject, in the size of the whole picture.
        geometry: how the picture reaches the model.
        name: of the mask, in what a user is told.
    """
    if mask.size != geometry.original:
        expected, got = ("{}x{}".format(*size) for size in (geometry.original, mask.size))
        raise UserError(f"{name} is {got}, its picture is {expected} pixels: make both of one size")
    pixels = pictures.to_mask(mask, geometry)
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


def word_positions(backbone: Backbone, prompt: str, word: str) -> list[int]:
    """Where a word (or several in a row) stands among the tokens of a prompt, at every occurrence.

    A word that is not in the prompt, or comes after the last token that the model reads, is a UserError.
    """

    def tokens(text: str) -> list[str]:
        ids = backbone.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [str(token) for token in backbone.tokenizer.convert_ids_to_tokens(ids)]

    said, sought = tokens(prompt), tokens(word)

    def begins() -> Iterator[int]:
        for at in range(len(said) - len(sought) + 1):
            whole = at == 0 or said[at - 1].endswith("</w>")  # not the end of a longer word
            if sought and whole and said[at : at + len(sought)] == sought:
                yield at

    found = sorted({1 + at + n for at in begins() for n in range(len(sought))})  # after the start token
    if not found:
        words = ", ".join(dict.fromkeys(prompt.split())) or "no words"
        raise UserError(f"{word!r} is not in the prompt {prompt!r}: expected one of {words}")
    if found[-1] > backbone.prompt_length - 2:
        raise UserError(f"{word!r} comes after the end of what the model reads of the prompt: say it earlier")
    return found


@torch.no_grad()
def from_word(
    backbone: Backbone, pixels: Float[Tensor, "3 h w"], prompt: str, word: str
) -> Float[Tensor, "h w"]:
    """Where the model looks for a word of the prompt in a picture: a mask of 0 and 1.

    The decoder's cross-attention to the word, against that to the prompt's start, is averaged over noised
    versions of the picture (always the same ones) and cut midway between its least and its most.

    Args:
        backbone: the model.
        pixels: the picture as the model takes it, in -1..1.
        prompt: what it shows.
        word: which word of the prompt; it may be several in a row.
    """
    positions = word_positions(backbone, prompt, word)
    device, alphas = backbone.alphas_cumprod.device, backbone.alphas_cumprod
    t = torch.tensor([int(share * len(alphas)) for share in SHARES], device=device)
    z_0, alpha = backbone.encode(pixels[None].to(device)), alphas[t].view(-1, 1, 1, 1)
    noise = torch.randn(len(t), *z_0.shape[1:], generator=torch.Generator().manual_seed(0)).to(device)
    z_t = alpha.sqrt() * z_0 + (1 - alpha).sqrt() * noise
    paths = cross_attentions(backbone.unet)
    decoder = [path for path in paths if path.startswith("up_blocks.")]
    with watching(backbone.unet, [positions], START, decoder or paths) as maps:
        backbone.eps(z_t, t, backbone.embed([prompt]).expand(len(t), -1, -1))
    seen = maps.now((pixels.shape[1], pixels.shape[2]))
    if seen is None:
        raise UserError("this checkpoint has no cross-attention to read a mask from: give a mask or use SAM")
    mean = seen.mean(0).cpu()
    return (mean > (mean.min() + mean.max()) / 2).float()
