"""Pictures that are given from Python: PIL images, arrays, or paths."""

from pathlib import Path
from typing import Any, cast

from PIL import Image, ImageOps

from kvinv_pl.errors import UserError

Picture = Image.Image | Image.SupportsArrayInterface | str | Path
"""A PIL image, a uint8 array (height, width, 3), or a path."""
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


def as_file(image: Picture, folder: Path, name: str) -> Path:
    """The path of a picture, written to `folder` if it has none; as TIFF where PNG cannot store it."""
    if isinstance(image, (str, Path)):
        return Path(image).expanduser()
    array: Any = getattr(image, "__array_interface__", None)
    if not isinstance(image, Image.Image) and array is not None and array["typestr"] == "|u1":
        try:
            image = Image.fromarray(cast(Any, image))
        except (TypeError, ValueError) as error:
            got = tuple(array["shape"])
            raise UserError(f"{name}: expected (height, width, 3), got {got}: transpose it") from error
    if not isinstance(image, Image.Image):
        shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
        got = type(image).__name__ if shape is None else f"{dtype} of {tuple(shape)}"
        raise UserError(
            f"{name}: expected a path, a PIL image or a uint8 array (height, width, 3), got {got}; "
            "PIL.Image.open and PIL.Image.fromarray make PIL images"
        )
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "YCbCr":  # pillow 12 writes it as a TIFF that it cannot read
        upright = upright.convert("RGB")
    path = folder / f"{name}.{'png' if upright.mode in PNG_MODES else 'tif'}"
    try:
        upright.save(path)
    except OSError as error:
        raise UserError(f"{name}: expected a picture, got one of mode {image.mode}: {error}") from error
    return path
