"""Pictures side by side with captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SHORTEST_SIDE = 192  # pixels: smaller pictures are enlarged, so that captions fit and a person sees them


def sheet(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """The pictures in one row, each over its caption (lines may be broken by hand)."""
    scale = max(1, -(-SHORTEST_SIDE // min(min(picture.size) for picture in pictures)))
    shown = [picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST) for picture in pictures]
    font = ImageFont.load_default(13)
    wrapped = [
        "\n".join(
            line for part in caption.splitlines() for line in textwrap.wrap(part, max(12, picture.width // 7)) or [""]
        )
        for picture, caption in zip(shown, captions, strict=True)
    ]
    text_height = 18 * max(caption.count("\n") + 1 for caption in wrapped) + 8
    gap = 8
    width = sum(picture.width for picture in shown) + gap * (len(shown) + 1)
    height = max(picture.height for picture in shown) + text_height + 2 * gap
    page = Image.new("RGB", (width, height), "white")
    draw, left = ImageDraw.Draw(page), gap
    for picture, caption in zip(shown, wrapped, strict=True):
        page.paste(picture, (left, gap))
        draw.multiline_text((left, gap + picture.height + 4), caption, fill="black", font=font, spacing=4)
        left += picture.width + gap
    return page
