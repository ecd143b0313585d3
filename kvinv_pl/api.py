"""The Python API: load a model, tune a picture, edit it; inside are the command line's module and trainer."""

import inspect
import shutil
import tempfile
import weakref
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from kvinv_pl.attention.config import variant_from_config
from kvinv_pl.attention.registry import resolve
from kvinv_pl.data.images.geometry import Mode
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.in_memory import Picture, as_file
from kvinv_pl.data.manifest import LISTS
from kvinv_pl.data.source_image import settings_of
from kvinv_pl.errors import UserError, near
from kvinv_pl.models.checkpoints.hub import require
from kvinv_pl.models.checkpoints.in_memory import IN_MEMORY, Pipeline, refuse_other_pipelines
from kvinv_pl.models.load_options import Precision
from kvinv_pl.stages.progress import AfterStep, Progress
from kvinv_pl.stages.settings import IDLE, EditSettings
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.trainer import KVTrainer


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

    def edit(self, target: str, *, progress: Progress | None = None, **settings: Any) -> Image.Image:
        """The picture edited to `target`; settings left out, or None, are as loaded. Nothing is tuned again.

        Args:
            target: What it should become.
            progress: Is told how far it is; None: the terminal, unless it is quiet.
            **settings: Settings of this edit, named as in KVInversion: guidance, reading, start, background
                and so on.
        """
        _require_text("target", target)
        return open_picture(self.edits([target], progress=progress, **settings)[0]).image

    def edits(
        self,
        targets: list[str],
        *,
        progress: Progress | None = None,
        after_step: AfterStep | None = None,
        **settings: Any,
    ) -> list[Path]:
        """Edits to several targets, rendered together; the files of their pictures, in the run folder.

        Args:
            targets: What it should become, an edit for each.
            progress: As for `edit`.
            after_step: As in `Observers`.
            **settings: As for `edit`.
        """
        _require_known("edit", settings, [setting.name for setting in fields(EditSettings)])
        changes = {name: value for name, value in settings.items() if value is not None}
        if searched := [name for name, value in changes.items() if value == "auto"]:
            name = searched[0]
            raise UserError(
                f"{name}: expected a value, got auto; pass it to load(): load(..., {name}='auto')"
            )
        # overwrite: a record does not tell all that may be other in memory, such as a hook
        data = SourceImages(run=str(self.folder), targets=targets, overwrite=True)
        model = self.owner.model
        self.owner.trainer(progress, after_step).edit(model, data, replace(model.editing, **changes))
        return model.last_edits

    def tune(self, progress: Progress | None = None) -> "Run":
        """Tune what is inverted, or tuned in part; `progress` as of `edit`."""
        self.owner.trainer(progress).fit(self.owner.model, datamodule=SourceImages(run=str(self.folder)))
        return self


class KVInverter:
    """A checkpoint with the settings of KV Inversion, ready to tune pictures."""

    def __init__(self, model: KVInversion, **trainer: Any) -> None:
        """Take the module, and options for the trainer such as accelerator and precision."""
        self.model, self._options = model, {"quiet": True, "logger": False, **trainer}
        self.trainer()  # refuses bad options now

    def trainer(self, progress: Progress | None = None, after_step: AfterStep | None = None) -> KVTrainer:
        """A fresh trainer with the options given; who is told, and what sees the steps, as of `Run.edits`."""
        trainer = KVTrainer(**self._options)
        trainer.observers.progress = progress or trainer.observers.progress
        trainer.observers.after_step = after_step
        return trainer

    def tune(
        self,
        image: Picture,
        source: str = "",
        out: str | Path | None = None,
        mask: Picture | None = None,
        geometry: Mode = "keep",
        stage: Literal["fit", "invert"] = "fit",
        size: int | None = None,
        progress: Progress | None = None,
    ) -> Run:
        """Invert and tune one picture.

        Args:
            image: A PIL image, a uint8 array (height, width, 3), or a path.
            source: What it shows; may be empty.
            out: The run folder, resumed if it exists; None: a temporary one, deleted with the Run.
            mask: A mask of the subject, in the same types, for variants that use one.
            geometry: keep, or crop.
            stage: fit, or invert, which leaves the tuning to `Run.tune`.
            size: The working size: shorter side of what the model sees, in pixels; None: the checkpoint's.
            progress: As for `Run.edit`.
        """
        _require_text("source", source)
        if isinstance(image, (str, Path)) and (Path(image).is_dir() or Path(image).suffix.lower() in LISTS):
            raise UserError(f"tune takes one picture, got {image}; a folder or list is for `kvinv fit`")
        folder = Path(tempfile.mkdtemp(prefix="kvinv-") if out is None else out).expanduser()
        run = Run(self, folder, temporary=out is None)
        with tempfile.TemporaryDirectory(prefix="kvinv-") as scratch:
            path = as_file(image, Path(scratch), "picture")
            mask_path = None if mask is None else str(as_file(mask, Path(scratch), "mask"))
            data = SourceImages(str(path), source, [], mask_path, str(folder), geometry, size=size)
            trainer = self.trainer(progress)
            (trainer.fit if stage == "fit" else trainer.invert)(self.model, datamodule=data)
        return run


def load(
    checkpoint: str | Path | Pipeline = "menagerie",
    *,
    accelerator: str = "auto",
    precision: Precision = "auto",
    quiet: bool = True,
    **settings: Any,
) -> KVInverter:
    """A Stable Diffusion checkpoint, ready to tune and edit.

    Args:
        checkpoint: "menagerie" (the embedded model), a diffusers folder, a .safetensors file, or a hub id; or
            a StableDiffusionPipeline in memory, which is copied when the first picture begins.
        accelerator: cpu, gpu, mps or auto.
        precision: 32-true, bf16-mixed or (on a GPU) 16-mixed; auto: depends on checkpoint and device.
        quiet: Whether to hide progress.
        **settings: Arguments of KVInversion, such as steps=50, guidance=7.5, start=0.1; attention may be the
            name of a variant.
    """
    model = load_module(checkpoint, **settings)
    return KVInverter(model, accelerator=accelerator, precision=precision, quiet=quiet)


def load_module(checkpoint: str | Path | Pipeline, **settings: Any) -> KVInversion:
    """The module alone; its checkpoint is loaded when a stage begins, and refused now if there is none."""
    _require_known("load", settings, list(inspect.signature(KVInversion).parameters))
    if isinstance(settings.get("attention"), str):
        settings["attention"] = resolve(settings["attention"])
    if isinstance(checkpoint, (str, Path)):
        model = KVInversion(str(checkpoint), **settings)
        require(model.checkpoint)
        return model
    refuse_other_pipelines(checkpoint)
    model = KVInversion(IN_MEMORY, **settings)
    model.pipeline = checkpoint
    return model


def open_run(folder: str | Path, **given: Any) -> Run:
    """A tuned run folder with the model and the settings that it was tuned with, ready to edit.

    Args:
        folder: The run folder.
        **given: Arguments of `load` instead of the run's own, for example accelerator.
    """
    return Run(load(**{**settings_to_open(folder), **given}), Path(folder).expanduser())


def settings_to_open(folder: str | Path) -> dict[str, Any]:
    """What `load` is given for a tuned run folder."""
    found = settings_of(Path(folder).expanduser(), IDLE)
    return {
        **found["model"],
        "attention": variant_from_config(found["model"]["attention"]),
        **found.get("trainer", {}),
    }


def _require_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        several = "; call it once for each" if isinstance(text, (list, tuple)) else ""
        raise UserError(f"{name}: expected a prompt, got {text!r}{several}")


def _require_known(call: str, settings: Collection[str], known: list[str]) -> None:
    if unknown := [name for name in settings if name not in known]:
        raise UserError(f"{call} has no setting {unknown[0]}{near(unknown[0], known)}")
