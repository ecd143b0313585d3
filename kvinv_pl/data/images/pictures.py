"""Photographs in: any file to upright 8-bit sRGB."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from kvinv_pl.errors import UserError

SMALLEST_SIDE = 8
MOST_PIXELS = 100_000_000
NO_FORMAT = (
    "expected JPEG, PNG, WebP, TIFF or the like, got no such format; save it as one of them (a list of "
    "pictures is a .csv, .tsv or .jsonl)"
)
_TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
"""The brands of HEIF after "ftyp", as the files of iPhones have them."""
_HEADER_ONLY = {"MPEG", "BUFR", "GRIB", "HDF5", "WMF"}
"""Formats of which pillow reads the first bytes alone."""
_MODE_NAMES = {"1": "black and white", "L": "grey", "LA": "grey", "P": "palette", "PA": "palette"}


@dataclass(frozen=True)
class Picture:
    """An upright 8-bit image (sRGB, or a mask), what was done to it, the SHA-256 of its size and pixels."""

    image: Image.Image
    notes: list[str]
    sha256: str


def open_picture(path: str | os.PathLike[str]) -> Picture:
    """Read a picture: EXIF turned, colours to sRGB, transparency over white, 8 bit; raises UserError."""
    return read_picture(path, _srgb)


def read_picture(
    path: str | os.PathLike[str], to_eight_bit: Callable[[Image.Image, list[str]], Image.Image]
) -> Picture:
    """Read a picture, upright, as `to_eight_bit` makes it of the file's own; raises UserError.

    That goes from a picture in the file's mode to mode RGB or L, and may add notes.
    """
    path = Path(path)
    if not os.path.isfile(path):
        what = "a folder" if path.is_dir() else "something else" if os.path.exists(path) else "nothing"
        raise UserError(f"expected a picture file at {path}, found {what}: check the path")
    notes: list[str] = []
    too_large = UserError(f"{path} has more than {MOST_PIXELS // 1_000_000} million pixels: make it smaller")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's remarks on odd files, and on sizes, which are checked here
        try:
            with _open(path) as opened:
                width, height = opened.size
                if width * height > MOST_PIXELS:
                    raise too_large
                if min(width, height) < SMALLEST_SIDE:
                    raise UserError(
                        f"{path} is {width}x{height}, expected {SMALLEST_SIDE} pixels a side or more: "
                        "take a larger one"
                    )
                opened.load()
                image = to_eight_bit(_upright(opened, notes), notes)
        except UserError:
            raise
        except Image.DecompressionBombError:
            raise too_large from None
        except Exception as error:  # PIL's readers raise nearly anything on a broken file
            known = not isinstance(error, UnidentifiedImageError)
            reason = f"{error}; save it again as PNG or JPEG" if known else NO_FORMAT
            raise UserError(f"{path} cannot be read as a picture: {reason}") from error
    pixels = np.ascontiguousarray(np.asarray(image))
    digest = sha256(f"{image.width}x{image.height}".encode() + pixels.tobytes()).hexdigest()
    return Picture(Image.fromarray(pixels), notes, digest)  # made anew: no profile or EXIF goes along


def is_picture(path: Path) -> bool:
    """Whether the beginning of a file is a picture's, of a format that pillow or pillow-heif reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as opened:
                return opened.format not in _HEADER_ONLY
        except Image.DecompressionBombError:
            return True
        except Exception:  # as below
            return _is_heif(path)


def _is_heif(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            begin = file.read(12)
    except OSError:
        return False
    return begin[4:8] == b"ftyp" and begin[8:] in _HEIF_BRANDS


def _open(path: Path) -> Image.Image:
    """As Image.open, and HEIC by pillow-heif."""
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        if not _is_heif(path):
            raise
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise UserError(
            f"{path} is a HEIC picture, which takes pillow-heif: pip install 'kvinv-pl[heic]', "
            "or save the picture as JPEG"
        ) from None
    register_heif_opener()
    return Image.open(path)


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.format != "MPO" and getattr(image, "is_animated", False):
        notes.append("only the first frame was taken")
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as above
        notes.append("its EXIF data is broken and was ignored")
        return image
    if orientation not in _TRANSPOSE_OF_ORIENTATION:
        return image
    notes.append(f"turned upright (EXIF orientation {orientation})")
    return image.transpose(_TRANSPOSE_OF_ORIENTATION[orientation])


def _srgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """RGB in sRGB, over white where transparent."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        image = _from_deep_grey(image, notes)
    elif image.mode not in ("RGB", "RGBA"):
        notes.append(f"{_MODE_NAMES.get(image.mode, image.mode)} turned into RGB")
    transparent = image.has_transparency_data
    with_alpha = image.convert("RGBA") if transparent else image
    if image.mode in ("1", "L", "LA"):
        colour = image.convert("L")
    else:
        colour = image if image.mode == "CMYK" else with_alpha.convert("RGB")
    if profile:
        colour = _from_profile(colour, profile, notes)
    colour = colour.convert("RGB")
    if not transparent or (alpha := with_alpha.getchannel("A")).getextrema() == (255, 255):
        return colour
    notes.append("transparency laid over white")
    white = Image.new("RGB", image.size, "white")
    white.paste(colour, mask=alpha)
    return white


def _from_deep_grey(image: Image.Image, notes: list[str]) -> Image.Image:
    """16-bit grey (PIL's modes I;16 and I) to 8 bit, with a transparent value's alpha."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("its grey values are not of 8 or 16 bit")
    notes.append("16-bit grey turned into 8-bit RGB")
    grey = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if (key := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _from_profile(colour: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """The colours of an embedded ICC profile in sRGB; a profile that is broken or does not fit is ignored."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip()
        if colour.mode == "RGB" and "sRGB" in name:
            return colour
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(colour, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ImportError) as error:
        notes.append(f"its colour profile was ignored ({error})")
        return colour
    notes.append(f"colours turned from {name!r} into sRGB")
    return converted or colour
