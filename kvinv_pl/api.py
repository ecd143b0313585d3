"""From Python: load a model, tune a picture, edit it; inside are the command line's module and trainer."""

import inspect
import shutil
import tempfile
import weakref
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, cast

from PIL import Image, ImageOps

from kvinv_pl.attention.registry import resolve
from kvinv_pl.data.manifest import LISTS
from kvinv_pl.data.pictures import open_picture
from kvinv_pl.errors import UserError, near
from kvinv_pl.models.in_memory import IN_MEMORY, Pipeline, refuse_other_pipelines
from kvinv_pl.stages.settings import EditSettings
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.trainer import KVTrainer

Picture = Image.Image | Image.SupportsArrayInterface | str | Path
"""A picture of pillow, an array of 8 bits (height, width, 3), or a path."""
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
            **settings: Of this edit, as KVInversion has them: guidance, reading, start, background and so on.
        """
        _require_text("target", target)
        _require_known("edit", settings, [setting.name for setting in fields(EditSettings)])
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
        image: Picture,
        source: str = "",
        out: str | Path | None = None,
        mask: Picture | None = None,
        geometry: Literal["keep", "crop"] = "keep",
    ) -> Run:
        """Invert and tune one picture.

        Args:
            image: A picture, of pillow or as an array of 8 bits (height, width, 3), or the path of one.
            source: What it shows; may be empty.
            out: The run folder, resumed if it exists; None: a temporary one, deleted with the Run.
            mask: A mask of the subject, for variants that take one, in the same kinds.
            geometry: keep, or crop.
        """
        _require_text("source", source)
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
    checkpoint: str | Path | Pipeline = "menagerie",
    *,
    accelerator: str = "auto",
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto",
    quiet: bool = True,
    **settings: Any,
) -> KVInverter:
    """A Stable Diffusion checkpoint, ready to tune and edit.

    Args:
        checkpoint: "menagerie" (the embedded model), a folder as diffusers saves it, a .safetensors file, or
            a hub id; or a StableDiffusionPipeline in memory, which is copied when the first picture begins.
        accelerator: cpu, gpu, mps or auto.
        precision: 32-true, bf16-mixed or (on a GPU) 16-mixed; auto: by checkpoint and device.
        quiet: Whether to hide progress.
        **settings: Arguments of KVInversion, such as steps=50, guidance=7.5, start=0.1; attention may be the
            name of a variant.
    """
    _require_known("load", settings, list(inspect.signature(KVInversion).parameters))
    if isinstance(settings.get("attention"), str):
        settings["attention"] = resolve(settings["attention"])
    if isinstance(checkpoint, (str, Path)):
        model = KVInversion(str(checkpoint), **settings)
    else:
        refuse_other_pipelines(checkpoint)
        model = KVInversion(IN_MEMORY, **settings)
        model.pipeline = checkpoint
    return KVInverter(model, accelerator=accelerator, precision=precision, quiet=quiet)


def as_file(image: Picture, folder: Path, name: str) -> Path:
    """The path of a picture, written to `folder` if it has none; as TIFF where PNG cannot store it."""
    if isinstance(image, (str, Path)):
        return Path(image)
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
            f"{name}: expected a path, a picture of pillow or an array of 8 bits (height, width, 3), "
            f"got {got}; PIL.Image.open and PIL.Image.fromarray make pictures"
        )
    upright = ImageOps.exif_transpose(image)
    path = folder / f"{name}.{'png' if upright.mode in PNG_MODES else 'tif'}"
    try:
        upright.save(path)
    except OSError as error:
        raise UserError(f"{name}: expected a picture, got one of mode {image.mode}: {error}") from error
    return path


def _require_text(name: str, text: object) -> None:
    """Refuse what is no prompt."""
    if not isinstance(text, str):
        several = "; call it once for each" if isinstance(text, (list, tuple)) else ""
        raise UserError(f"{name}: expected a prompt, got {text!r}{several}")


def _require_known(call: str, settings: Collection[str], known: list[str]) -> None:
    """Refuse settings that there are not."""
    if unknown := [name for name in settings if name not in known]:
        raise UserError(f"{call} has no setting {unknown[0]}{near(unknown[0], known)}")
