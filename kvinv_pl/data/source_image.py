"""A picture with its prompts and its run folder, from its file or from an existing run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kvinv_pl.data.images.geometry import Mode, as_pixels, fit_geometry, to_size, working_size
from kvinv_pl.data.images.masks import fit_mask, open_mask
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.runs.records import picture_record
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError

Stage = Literal["invert", "fit", "edit"]
CHECKPOINT_OPTIONS = {
    **dict.fromkeys(("variant", "vae", "prediction_type", "timestep_spacing", "loras", "embeddings")),
    "clip_skip": 1,
    "prompt_syntax": "plain",
}
"""The options that run.json has beside the checkpoint, except those with these values."""


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """A picture in the model's size, and its record; one byte a value, because it is kept."""

    record: dict[str, Any]
    """run.json's field "picture"."""
    image: Image.Image
    """In the model's size."""
    mask: Tensor | None
    """(h, w) in 0 .. 1, in the model's size."""

    @property
    def pixels(self) -> Float[Tensor, "3 h w"]:
        """In -1 .. 1."""
        return as_pixels(self.image)


@dataclass(eq=False)
class SourceImage:
    """One picture, and its run folder.

    Without a `path` the folder must contain the results of the earlier stages.
    """

    name: str
    store: RunStore
    path: Path | None
    source: str
    targets: list[str]
    mask: Path | None = None
    geometry: Mode = "keep"
    invert_mask: bool = False
    size: int | None = None
    """The shorter side of the model's pixels; None: as the checkpoint was made for."""
    shared: bool = False
    """Whether another one is of the same picture, by other prompts or another mask."""
    _loaded: tuple[Any, LoadedImage] | None = field(default=None, init=False, repr=False)

    @property
    def label(self) -> str:
        """The name in messages, which no other has: the picture's path, or the run folder, or both."""
        if self.path is not None and self.shared:
            return f"{self.path} ({self.store.folder})"
        return str(self.path or self.store.folder)

    def load(self, sample_size: tuple[int, int], multiple: int) -> LoadedImage:
        """The picture and its mask, read once until `close`; raises UserError if they are not valid.

        Args:
            sample_size: Height and width that the model was made for; see `fit_geometry`.
            multiple: What both sides of its pixels have to be multiples of.
        """
        if self._loaded is None or self._loaded[0] != (sample_size, multiple):
            self._loaded = (sample_size, multiple), self._load(sample_size, multiple)
        return self._loaded[1]

    def _load(self, sample_size: tuple[int, int], multiple: int) -> LoadedImage:
        if self.path is None:
            raise UserError(f"{self.store.folder} is not inverted, and no picture was given: give --image")
        picture = open_picture(self.path)
        wanted = working_size(sample_size, self.size, multiple)
        geometry = fit_geometry(picture.image.size, wanted, multiple, self.geometry)
        mask = open_mask(self.mask, self.invert_mask) if self.mask else None
        return LoadedImage(
            picture_record(self.name, picture, geometry, self.geometry, mask.sha256 if mask else None),
            to_size(picture.image, geometry),
            fit_mask(mask.image, geometry, f"the mask {self.mask}") if mask else None,
        )

    def close(self) -> None:
        """Forget what was read: the file may change until the next time."""
        self._loaded = None

    def remember_targets(self) -> None:
        """Write the targets to run.json, as the default of later edits."""
        run = self.store.read_run()
        if self.targets and run.get("targets") != self.targets:
            self.store.write_run({**run, "targets": self.targets})


def _stores_in(folder: Path) -> list[RunStore]:
    """The run in this folder, or the runs in its subfolders."""
    if RunStore(folder).has_run():
        return [RunStore(folder)]
    stores = [RunStore(file.parent) for file in sorted(folder.glob("*/run.json"))]
    if not stores:
        what = "it has no run.json, nor has a folder in it" if folder.is_dir() else "there is no such folder"
        raise UserError(
            f"{folder} is not a run folder: {what}; name one that `kvinv fit` or `kvinv run` made"
        )
    return stores


@contextmanager
def _reading(store: RunStore) -> Iterator[None]:
    """Raise UserError with the field that a run.json lacks."""
    try:
        yield
    except (KeyError, TypeError) as error:
        file = store.folder / "run.json"
        raise UserError(f"{file} is damaged (it lacks {error}): remove the run and make it again") from error


def images_in(folder: Path, targets: list[str], failed: dict[str, str]) -> Iterator[SourceImage]:
    """The runs in a folder, or the one that it is; damaged ones go to `failed`.

    The default of the targets are those in the run's run.json.
    """
    stores = _stores_in(folder)
    for store in stores:
        try:
            with _reading(store):
                record = store.read_run()
                picture, source = record["picture"], record["source"]
                mask = store.folder / "mask.png" if picture["mask"] else None
                prompts = targets or _recorded_targets(store, record)
                image = SourceImage(picture["name"], store, None, source, prompts, mask, picture["mode"])
        except UserError as error:
            if len(stores) == 1:
                raise
            failed[str(store.folder)] = str(error)
            continue
        yield image


def _recorded_targets(store: RunStore, run: Mapping[str, Any]) -> list[str]:
    targets = run.get("targets", [])
    if not (isinstance(targets, list) and all(isinstance(target, str) for target in targets)):
        file = store.folder / "run.json"
        raise UserError(f"{file} is damaged (targets: expected a list of texts): give --target")
    return targets


def tuned_with(run: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a tuned run was made with, without those of its edits and of the tuning alone."""
    model, tuning = run["model"], run["tuning"]
    return {
        "checkpoint": model["checkpoint"],
        **{name: model[name] for name in CHECKPOINT_OPTIONS if name in model},
        "attention": tuning["attention"],
        "target_modules": tuning["sites"],
        "max_grid": tuning["max_grid"],
        "steps": run["scheduler"]["steps"],
    }


def _settings_in(folder: Path, run: Mapping[str, Any], idle: Mapping[str, Any]) -> dict[str, Any]:
    if "tuning" not in run:
        raise UserError(f"{folder} is not tuned: run `kvinv fit` before editing")
    return {**CHECKPOINT_OPTIONS, **tuned_with(run), "kv": run["tuning"]["kv"], **idle, **run["editing"]}


def settings_of(folder: Path, idle: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run folder (or of all runs in a folder, which must agree), for its next edit.

    `idle` are the settings of an edit at which runs leave them out; left out of an edit, some have others.
    """
    settings, errors = [], list[UserError]()
    for store in _stores_in(folder):
        try:
            with _reading(store):
                settings.append(_settings_in(store.folder, store.read_run(), idle))
        except UserError as error:  # reported after the others are done
            errors.append(error)
    if not settings:
        raise errors[0]
    precisions = {each.pop("precision", None) for each in settings} - {None}  # older runs do not have it
    if any(other != settings[0] for other in settings) or len(precisions) > 1:
        raise UserError(f"the runs in {folder} were made with different settings: edit them one by one")
    trainer = {"trainer": {"precision": precisions.pop()}} if precisions else {}
    return {"model": settings[0], "data": {"run": str(folder)}, **trainer}
