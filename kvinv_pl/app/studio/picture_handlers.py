"""Event handlers of the page's left side: a picture, its subject, and its tuning."""

from typing import Any

import gradio as gr
from PIL import Image

from kvinv_pl.app import subject_mask
from kvinv_pl.app.studio.workbench.frames import STUDIO_DIR
from kvinv_pl.app.studio.workbench.workbench import Workbench
from kvinv_pl.data.images import masks
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.runs.files import write_png
from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import Animal

ANIMALS = (7, 12, 23)
"""Seeds of those that are there to try."""


class PictureHandlers:
    """The event handlers of a picture that is not tuned yet; its state is in the page itself."""

    def __init__(self, bench: Workbench, checkpoint: str, sam: str) -> None:
        self.bench, self.checkpoint, self.sam = bench, checkpoint, sam

    def take(self, event: gr.SelectData) -> tuple[Any, ...]:
        """An animal of the embedded world, with prompts and its word."""
        animal = Animal.sample(ANIMALS[event.index])
        other = "sitting" if animal.action == "running" else "running"
        folder = self.bench.folder / STUDIO_DIR
        file = write_png(folder / f"{animal.species}-{animal.seed}.png", animal.render())
        return str(file), animal.prompt(), animal.prompt(other), animal.species, *self.unmask()

    def point(self, file: str | None, event: gr.SelectData) -> tuple[Image.Image, Any]:
        """The subject where the picture was clicked on."""
        image, (x, y) = _open(file), event.index
        return _show_mask(image, subject_mask.at_points(image, [(x, y)], sam=self.sam))

    def by_word(self, file: str | None, word: str, source: str) -> tuple[Image.Image, Any]:
        """The subject by its word in the source prompt."""
        image = _open(file)
        if not word.strip() or not source.strip():
            raise UserError("the subject: expected a word, and a prompt that contains it")
        return _show_mask(image, subject_mask.of_word(image, word.strip(), source, self.checkpoint))

    def unmask(self) -> tuple[None, Any]:
        """No mask."""
        return None, gr.Image(visible=False)

    def begin(self, file: str | None, source: str, target: str, mask: Image.Image | None) -> Any:
        """A new run, which is the page's from here on."""
        if file is None:
            raise UserError("tune: expected a picture, got none: drop one, or take an animal")
        job = self.bench.tune(file, source.strip(), target.strip(), mask)
        return gr.Dropdown(choices=self.bench.runs(), value=job.run)


def _open(file: str | None) -> Image.Image:
    if file is None:
        raise UserError("the subject: expected a picture, got none: drop one first")
    return open_picture(file).image


def _show_mask(image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Any]:
    """The mask, and the picture with the subject tinted."""
    share = mask.histogram()[255] / (mask.width * mask.height)
    label = f"The subject: {share:.0%} of the picture"
    return mask, gr.Image(masks.tint_subject(image, mask), visible=True, label=label)
