"""The mask of a picture's subject, by a click on it or by its word."""

from collections.abc import Sequence

from PIL import Image

from kvinv_pl.data.images.geometry import fit_geometry, to_pixels
from kvinv_pl.data.images.masks import enlarge_mask
from kvinv_pl.errors import UserError
from kvinv_pl.models.load_options import DEFAULTS, LoadOptions
from kvinv_pl.models.prompts import mask_from_word
from kvinv_pl.models.stable_diffusion import Backbone
from kvinv_pl.models.vision.sam import Box, Point, Segmenter


def at_points(
    image: Image.Image, points: Sequence[Point] = (), box: Box | None = None, sam: str = "menagerie"
) -> Image.Image:
    """The mask that SAM finds at points, in a box, or of the most prominent object."""
    return _require_subject(Segmenter.load(sam).segment(image, points, box))


def of_word(
    image: Image.Image, word: str, source: str, checkpoint: str = "menagerie", options: LoadOptions = DEFAULTS
) -> Image.Image:
    """The mask from the model's own attention to a word of the prompt, in the picture's size."""
    backbone = Backbone.load(checkpoint, options=options)
    geometry = fit_geometry(image.size, backbone.sample_size, backbone.multiple, "keep")
    mask = mask_from_word(backbone, to_pixels(image, geometry), source, word)
    return _require_subject(enlarge_mask(mask, geometry))


def _require_subject(mask: Image.Image) -> Image.Image:
    if len(set(mask.getextrema())) == 1:
        raise UserError("no subject was found: give another --point, a --box around it, or another --word")
    return mask
