"""Pictures side by side with captions."""

import textwrap
from collections.abc import Collection, Sequence

from PIL import Image, ImageDraw, ImageFont

SIDES = 192, 768  # pixels, shortest and longest: small pictures are enlarged to be seen, large ones reduced
ACROSS = 5  # pictures in a row
GAP, LINE, LETTER = 8, 18, 7  # pixels
BORDER, MARK = 4, "#1d4ed8"  # pixels and colour, around a picture that is marked


def sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    across: int = ACROSS,
    marked: Collection[int] = (),
) -> Image.Image:
    """The pictures in rows of `across`, each over its caption (lines may be broken by hand).

    Those that are marked, by their numbers from 0 on, have a border.
    """
    tiles = [_at_display_size(picture) for picture in pictures]
    texts = [_wrapped(caption, picture.width) for caption, picture in zip(captions, tiles, strict=True)]
    rows = [range(begin, min(begin + across, len(tiles))) for begin in range(0, len(tiles), across)]
    pictures_high = [max(tiles[n].height for n in row) for row in rows]
    texts_high = [LINE * max(texts[n].count("\n") + 1 for n in row) + GAP for row in rows]
    width = max(sum(tiles[n].width + GAP for n in row) for row in rows) + GAP
    page = Image.new("RGB", (width, sum(pictures_high) + sum(texts_high) + GAP * (len(rows) + 1)), "white")
    draw, font, top = ImageDraw.Draw(page), ImageFont.load_default(13), GAP
    for row, picture_high, text_high in zip(rows, pictures_high, texts_high, strict=True):
        left = GAP
        for n in row:
            page.paste(tiles[n], (left, top))
            if n in marked:
                right, bottom = left + tiles[n].width - 1, top + tiles[n].height - 1
                around = (left - BORDER, top - BORDER, right + BORDER, bottom + BORDER)
                draw.rectangle(around, outline=MARK, width=BORDER)
            draw.multiline_text(
                (left, top + tiles[n].height + 4), texts[n], fill="black", font=font, spacing=4
            )
            left += tiles[n].width + GAP
        top += picture_high + text_high + GAP
    return page


def _at_display_size(picture: Image.Image) -> Image.Image:
    """A picture in a size to look at; enlarged by a whole number, so that its pixels stay pixels."""
    shortest, longest = SIDES
    scale = min(-(-shortest // min(picture.size)), longest // max(picture.size))
    if scale > 1:
        return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    smaller = picture.copy()
    smaller.thumbnail((longest, longest))
    return smaller


def _wrapped(caption: str, width: int) -> str:
    letters = max(12, width // LETTER)
    return "\n".join(line for part in caption.splitlines() for line in textwrap.wrap(part, letters) or [""])
