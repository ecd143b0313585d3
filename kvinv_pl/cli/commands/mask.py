"""`kvinv mask`: find the subject of a picture. The docstring is the help."""

from pathlib import Path

from kvinv_pl.errors import UserError
from kvinv_pl.models.load_options import DEFAULTS, LoadOptions


def mask(
    image: str,
    out: str = "mask.png",
    point: list[str] = [],  # noqa: B006  (jsonargparse shows it)
    box: str | None = None,
    sam: str | None = None,
    word: str | None = None,
    source: str | None = None,
    checkpoint: str | None = None,
    model: LoadOptions = DEFAULTS,
) -> None:
    """Find the subject of a picture, write its mask, and show it over the picture, to look at before tuning.

    Without a point, box or word, it is the largest, most central object that SAM finds.

    Args:
        image: The picture; `kvinv mask FILE` does as well.
        out: The PNG file to write to (also -o); NAME-shown.png is written beside it.
        point: X,Y in pixels from the upper left corner, on the subject; repeatable.
        box: X0,Y0,X1,Y1 in pixels: left, top, right and bottom of a box around the subject.
        sam: A transformers SAM folder, a hub id, or menagerie, which is also the default.
        word: Instead of SAM: a word of --source; the mask comes from the model's cross-attention to it.
        source: With --word: what the picture shows.
        checkpoint: With --word: a Stable Diffusion folder or file, a hub id, or menagerie, also the default.
        model: Loading options of --checkpoint, the same as those of `kvinv run`.
    """
    file, prompted = Path(out).expanduser(), {"--point": point, "--box": box, "--sam": sam}
    if word is not None and (conflicting := [flag for flag, value in prompted.items() if value]):
        raise UserError(
            f"{', '.join(conflicting)} is for SAM and cannot be combined with --word: leave one of them out"
        )
    if word is None and (source is not None or checkpoint is not None or model != DEFAULTS):
        raise UserError("--source, --checkpoint and --model only work with --word: add --word")
    if word is not None and not source:
        raise UserError("--word needs --source, what the picture shows: add --source")
    if file.suffix.lower() != ".png":
        raise UserError(f"out: expected the name of a .png file, got {out}")
    points = [(x, y) for x, y in (_numbers("--point", text, "X,Y") for text in point)]
    edges = None
    if box is not None:
        left, top, right, bottom = _numbers("--box", box, "X0,Y0,X1,Y1")
        edges = left, top, right, bottom
    from kvinv_pl.app import subject_mask
    from kvinv_pl.data.images import masks
    from kvinv_pl.data.images.pictures import open_picture
    from kvinv_pl.data.images.sheet import sheet
    from kvinv_pl.data.runs.files import write_png

    picture = open_picture(Path(image).expanduser())
    if file.exists() and file.samefile(Path(image).expanduser()):
        raise UserError(f"out: {out} is the picture itself: name another file")
    if word is not None:
        found = subject_mask.of_word(picture.image, word, source or "", checkpoint or "menagerie", model)
    else:
        found = subject_mask.at_points(picture.image, points, edges, sam or "menagerie")
    share = found.histogram()[255] / (found.width * found.height)
    shown = [picture.image, masks.tint_subject(picture.image, found)]
    page = sheet(shown, [Path(image).name, f"mask: {share:.0%} of it"])
    print(write_png(file, found))
    print(write_png(file.with_name(f"{file.stem}-shown.png"), page))


def _numbers(flag: str, text: str, wanted: str) -> tuple[float, ...]:
    """Numbers between commas, as many as `wanted` has."""
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != wanted.count(",") + 1:
        raise UserError(f"{flag}: expected {wanted} in pixels, got {text!r}")
    return numbers
