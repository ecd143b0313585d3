"""From Python: load a model, tune a picture, edit it. Inside are the same module and trainer as on the command line."""

import tempfile
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from kvinv_pl import pictures
from kvinv_pl.data import SourceImages
from kvinv_pl.errors import UserError
from kvinv_pl.module import KVInversion
from kvinv_pl.trainer import KVTrainer


class Run:
    """One tuned picture and its run folder."""

    def __init__(self, owner: "KVInverter", folder: Path, keep_alive: Any = None) -> None:
        """Name the folder; `keep_alive` is what must live as long as the run."""
        self.owner, self.folder, self._keep_alive = owner, folder, keep_alive

    @property
    def reconstruction(self) -> Image.Image:
        """The picture as the tuned model renders it, in the size that it came in."""
        return pictures.open_picture(self.folder / "reconstruction.png").image

    def edit(
        self,
        target: str,
        *,
        guidance: float | None = None,
        reading: Literal["frozen", "blend"] | None = None,
        start: float | None = None,
        negative: str | None = None,
    ) -> Image.Image:
        """The picture as `target` says; what is left out is as the model was loaded with. Nothing is tuned again."""
        model = self.owner.model
        before = (model.guidance, model.reading, model.start, model.negative)
        changes = (guidance, reading, start, negative)
        model.guidance, model.reading, model.start, model.negative = (
            old if new is None else new for old, new in zip(before, changes, strict=True)
        )
        try:
            model.check_settings()
            data = SourceImages(run=str(self.folder), targets=[target])
            self.owner.trainer().edit(model, data)
            return pictures.open_picture(model.last_edits[0]).image
        finally:
            model.guidance, model.reading, model.start, model.negative = before


class KVInverter:
    """A checkpoint with the settings of KV Inversion, ready to tune pictures."""

    def __init__(self, model: KVInversion, **trainer: Any) -> None:
        """Take the module, and options for the trainer such as accelerator and precision."""
        self.model, self._options = model, {"quiet": True, "logger": False, **trainer}
        self.trainer()  # bad options are found now

    def trainer(self) -> KVTrainer:
        """A fresh trainer with the options given."""
        return KVTrainer(**self._options)

    def tune(
        self,
        image: Image.Image | str | Path,
        source: str = "",
        out: str | Path | None = None,
        mask: str | Path | None = None,
        geometry: Literal["keep", "crop"] = "keep",
    ) -> Run:
        """Invert and tune one picture.

        Args:
            image: A picture, or the path of one.
            source: What it shows; may be empty.
            out: The run folder, gone on with if it exists; None: a temporary one that lives as long as the Run.
            mask: Path of a mask of the subject, for variants that take one.
            geometry: keep, or crop.
        """
        keep = None if out is not None else tempfile.TemporaryDirectory(prefix="kvinv-")
        folder = Path(out) if keep is None else Path(keep.name)
        with tempfile.TemporaryDirectory(prefix="kvinv-") as scratch:
            if isinstance(image, Image.Image):
                path = Path(scratch) / "picture.png"
                image.save(path)
            else:
                path = Path(image)
            data = SourceImages(str(path), source, [], str(mask) if mask else None, str(folder), geometry)
            if path.is_dir() or len(data.works) != 1 or data.works[0].store.folder != folder:
                raise UserError(f"tune takes one picture, got {image}; a folder or list is for `kvinv fit`")
            self.trainer().fit(self.model, datamodule=data)
        return Run(self, folder, keep)


def load(
    checkpoint: str | Path = "menagerie",
    *,
    accelerator: str = "auto",
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    quiet: bool = True,
    **settings: Any,
) -> KVInverter:
    """A Stable Diffusion checkpoint, ready to tune and edit.

    Args:
        checkpoint: "menagerie" (the embedded model), a folder as diffusers saves it, or a hub id.
        accelerator: cpu, gpu, mps or auto.
        precision: 32-true, bf16-mixed or (on a GPU) 16-mixed.
        quiet: Whether to keep progress to itself.
        **settings: Arguments of KVInversion, such as steps=50, guidance=7.5, start=0.1.
    """
    return KVInverter(
        KVInversion(str(checkpoint), **settings), accelerator=accelerator, precision=precision, quiet=quiet
    )
