"""`kvinv mask`: find the subject of a picture. The docstring is the help."""

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from kvinv_pl.errors import UserError
from kvinv_pl.models.choices import NO_CHOICES, Choices

if TYPE_CHECKING:
    from kvinv_pl.data.pictures import Picture


def mask(
    image: str,
    out: str = "mask.png",
    point: list[str] = [],  # noqa: B006  (jsonargparse shows it)
    box: str | None = None,
    sam: str | None = None,
    word: str | None = None,
    source: str | None = None,
    checkpoint: str | None = None,
    model: Choices = NO_CHOICES,
) -> None:
    """Find the subject of a picture, write its mask, and show it over the picture, to look at before tuning.

    Without a point, box or word it is the largest, most central object that SAM finds.

    Args:
        image: The picture; `kvinv mask FILE` does as well.
        out: The PNG file to write to (also -o); NAME-shown.png is written beside it.
        point: X,Y in pixels from the upper left corner, on the subject; repeatable.
        box: X0,Y0,X1,Y1 in pixels: left, top, right and bottom of a box around the subject.
        sam: A SAM folder as transformers saves it, a hub id, or menagerie, which is also the default.
        word: Without SAM: a word of --source; the mask comes from the model's own cross-attention to it.
        source: With --word: what the picture shows.
        checkpoint: With --word: a Stable Diffusion folder or file, a hub id, or menagerie, also the default.
        model: What --checkpoint is loaded with, as of `kvinv run`.
    """
    file, prompted = Path(out).expanduser(), {"--point": point, "--box": box, "--sam": sam}
    if word is not None and (conflicting := [flag for flag, value in prompted.items() if value]):
        raise UserError(
            f"{', '.join(conflicting)} is for SAM and does not go with --word: leave one of them out"
        )
    if word is None and (source is not None or checkpoint is not None or model != NO_CHOICES):
        raise UserError(
            "--source, --checkpoint and --model go with --word, which names the subject: give that too"
        )
    if word is not None and not source:
        raise UserError("--word needs --source, what the picture shows: give that too")
    if file.suffix.lower() != ".png":
        raise UserError(f"out: expected the name of a .png file, got {out}")
    points = [(x, y) for x, y in (_numbers("--point", text, "X,Y") for text in point)]
    edges = None
    if box is not None:
        left, top, right, bottom = _numbers("--box", box, "X0,Y0,X1,Y1")
        edges = left, top, right, bottom
    from kvinv_pl.data import masks
    from kvinv_pl.data.files import write_png
    from kvinv_pl.data.pictures import open_picture
    from kvinv_pl.data.sheet import sheet

    picture = open_picture(Path(image).expanduser())
    if file.exists() and file.samefile(Path(image).expanduser()):
        raise UserError(f"out: {out} is the picture itself: name another file")
    if word is not None:
        found = _mask_of_word(picture, word, source or "", checkpoint or "menagerie", model)
    else:
        from kvinv_pl.models.sam import Segmenter

        found = Segmenter.load(sam or "menagerie").segment(picture.image, points, edges)
    if len(set(found.getextrema())) == 1:
        raise UserError("no subject was found: give another --point, a --box around it, or another --word")
    share = found.histogram()[255] / (found.width * found.height)
    shown = [picture.image, masks.shown(picture.image, found)]
    page = sheet(shown, [Path(image).name, f"mask: {share:.0%} of it"])
    print(write_png(file, found))
    print(write_png(file.with_name(f"{file.stem}-shown.png"), page))


def _mask_of_word(
    picture: "Picture", word: str, source: str, checkpoint: str, choices: Choices
) -> Image.Image:
    """The mask of a word of the prompt, in the picture's size."""
    from kvinv_pl.data.pictures import fit_geometry, to_image, to_pixels
    from kvinv_pl.models.prompts import mask_from_word
    from kvinv_pl.models.stable_diffusion import Backbone

    backbone = Backbone.load(checkpoint, choices=choices)
    geometry = fit_geometry(picture.image.size, backbone.sample_size, backbone.multiple, "keep")
    mask = mask_from_word(backbone, to_pixels(picture.image, geometry), source, word)
    enlarged = to_image(mask.expand(3, -1, -1) * 2 - 1, geometry)
    return enlarged.convert("L").point([0] * 128 + [255] * 128)


def _numbers(flag: str, text: str, wanted: str) -> tuple[float, ...]:
    """Numbers between commas, as many as `wanted` has."""
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != wanted.count(",") + 1:
        raise UserError(f"{flag}: expected {wanted} in pixels, got {text!r}")
    return numbers
