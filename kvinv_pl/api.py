"""From Python: load a model, tune a picture, edit it; inside are the command line's module and trainer."""

import shutil
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps

from kvinv_pl.data.manifest import LISTS
from kvinv_pl.data.pictures import open_picture
from kvinv_pl.errors import UserError
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.trainer import KVTrainer

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


class Run:
    """One tuned picture and its run folder."""

    def __init__(self, owner: "KVInverter", folder: Path, temporary: bool = False) -> None:
        """Name the folder; a temporary one goes when the run does."""
        self.owner, self.folder = owner, folder
        if temporary:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @property
    def reconstruction(self) -> Image.Image:
        """The picture as the tuned model renders it, in the size that it came in."""
        return open_picture(self.folder / "reconstruction.png").image

    def edit(self, target: str, **settings: Any) -> Image.Image:
        """The picture edited to `target`; settings left out, or None, are as loaded. Nothing is tuned again.

        Args:
            target: What it should become.
            **settings: Of this edit, as KVInversion has them: guidance, source_guidance, reading, start,
                negative, kv and subject.
        """
        changes = {name: value for name, value in settings.items() if value is not None}
        # overwrite: the model in memory may have changed, with a LoRA for example
        data = SourceImages(run=str(self.folder), targets=[target], overwrite=True)
        model = self.owner.model
        self.owner.trainer().edit(model, data, replace(model.editing, **changes))
        return open_picture(model.last_edits[0]).image


class KVInverter:
    """A checkpoint with the settings of KV Inversion, ready to tune pictures."""

    def __init__(self, model: KVInversion, **trainer: Any) -> None:
        """Take the module, and options for the trainer such as accelerator and precision."""
        self.model, self._options = model, {"quiet": True, "logger": False, **trainer}
        self.trainer()  # refuses bad options now

    def trainer(self) -> KVTrainer:
        """A fresh trainer with the options given."""
        return KVTrainer(**self._options)

    def tune(
        self,
        image: Image.Image | str | Path,
        source: str = "",
        out: str | Path | None = None,
        mask: Image.Image | str | Path | None = None,
        geometry: Literal["keep", "crop"] = "keep",
    ) -> Run:
        """Invert and tune one picture.

        Args:
            image: A picture, or the path of one.
            source: What it shows; may be empty.
            out: The run folder, resumed if it exists; None: a temporary one, deleted with the Run.
            mask: A mask of the subject, for variants that take one, or the path of it.
            geometry: keep, or crop.
        """
        if isinstance(image, (str, Path)) and (Path(image).is_dir() or Path(image).suffix.lower() in LISTS):
            raise UserError(f"tune takes one picture, got {image}; a folder or list is for `kvinv fit`")
        folder = Path(tempfile.mkdtemp(prefix="kvinv-") if out is None else out)
        run = Run(self, folder, temporary=out is None)
        with tempfile.TemporaryDirectory(prefix="kvinv-") as scratch:
            path = as_file(image, Path(scratch), "picture")
            mask_path = None if mask is None else str(as_file(mask, Path(scratch), "mask"))
            data = SourceImages(str(path), source, [], mask_path, str(folder), geometry)
            self.trainer().fit(self.model, datamodule=data)
        return run


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
        checkpoint: "menagerie" (the embedded model), a folder as diffusers saves it, a .safetensors file, or
            a hub id.
        accelerator: cpu, gpu, mps or auto.
        precision: 32-true, bf16-mixed or (on a GPU) 16-mixed.
        quiet: Whether to hide progress.
        **settings: Arguments of KVInversion, such as steps=50, guidance=7.5, start=0.1.
    """
    model = KVInversion(str(checkpoint), **settings)
    return KVInverter(model, accelerator=accelerator, precision=precision, quiet=quiet)


def as_file(image: Image.Image | str | Path, folder: Path, name: str) -> Path:
    """The path of a picture, written to `folder` if it has none; as TIFF where PNG cannot store it."""
    if not isinstance(image, Image.Image):
        return Path(image)
    upright = ImageOps.exif_transpose(image)
    path = folder / f"{name}.{'png' if upright.mode in PNG_MODES else 'tif'}"
    try:
        upright.save(path)
    except OSError as error:
        raise UserError(f"{name}: expected a picture, got one of mode {image.mode}: {error}") from error
    return path
