"""The runs of a folder, and what can be done with them: tune, edit, look. A page only shows this."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from kvinv_pl.api import KVInverter, Run, load, settings_to_open
from kvinv_pl.app.again import as_yaml, settings_again
from kvinv_pl.app.studio.jobs import Job, Jobs, Told
from kvinv_pl.data.files import write_atomically, write_png
from kvinv_pl.data.geometry import to_image
from kvinv_pl.data.pictures import open_picture
from kvinv_pl.data.records import geometry_of
from kvinv_pl.data.run_store import RunStore
from kvinv_pl.data.source_image import settings_of
from kvinv_pl.errors import UserError
from kvinv_pl.stages.settings import EditSettings

FRAMES = 8
"""Predicted pictures along an edit."""
OWN = ".studio"
"""Of the folder, and of a run: what the page keeps besides."""
MASKED = "masked"


class Workbench:
    """A folder with its runs, one model, and a queue; nothing is written outside the folder."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        """Make the folder.

        Args:
            folder: Where the runs are.
            **settings: Arguments of `load` for the pictures that are tuned here.
        """
        self.folder, self._settings = folder.resolve(), settings
        (self.folder / OWN).mkdir(parents=True, exist_ok=True)
        self.jobs = Jobs()
        inverter = load(**settings)  # refuses bad settings now
        self._model: tuple[set[str], KVInverter] | None = ({"tune False"}, inverter)
        self._editing = inverter.model.editing

    # ---- runs

    def runs(self) -> list[str]:
        """The runs of the folder, the newest first; those that have only begun, too."""
        found = [each for each in self.folder.iterdir() if _asked(each).is_file() or RunStore(each).has_run()]
        return [each.name for each in sorted(found, key=lambda each: -each.stat().st_mtime_ns)]

    def store(self, name: str) -> RunStore:
        """The run of this name, which is one of the folder's."""
        if name not in self.runs():
            raise UserError(f"no run {name!r} in {self.folder}: choose one of the list")
        return RunStore(self.folder / name)

    def record(self, name: str) -> dict[str, Any] | None:
        """Its run.json, if there is one yet."""
        store = self.store(name)
        return store.read_run() if store.has_run() else None

    def prompts(self, name: str) -> tuple[str, list[str]]:
        """What a run's picture shows, and what it was to become."""
        if (file := _asked(self.store(name).folder)).is_file():
            asked = json.loads(file.read_text(encoding="utf-8"))
            return asked["source"], asked["targets"]
        run = self.store(name).read_run()
        return run["source"], run.get("targets", [])

    # ---- work

    def tune(
        self, picture: Path | str, source: str, target: str = "", mask: Image.Image | None = None
    ) -> Job:
        """A new run of a picture, which is copied into the folder first."""
        open_picture(picture)  # refused now, if it is none
        name = self._new_name(Path(picture).stem)
        own = self.folder / name / OWN
        (own / "picture").mkdir(parents=True)
        shutil.copyfile(picture, own / "picture" / Path(picture).name)
        if mask is not None:
            write_png(own / "mask.png", mask)
        asked = {"source": source, "targets": [target] if target else []}
        write_atomically(_asked(own.parent), json.dumps(asked, ensure_ascii=False).encode())
        return self.resume(name)

    def resume(self, name: str) -> Job:
        """Tune a run to the end, from where it was stopped."""
        folder, (source, _) = self.store(name).folder, self.prompts(name)
        picture = next((folder / OWN / "picture").glob("*"), None)
        if picture is None:
            raise UserError(
                f"{name} was not begun in a studio: `kvinv fit`, as it was given, goes on with it"
            )
        mask = folder / OWN / "mask.png"

        def work(job: Job) -> None:
            inverter = self._to_tune(mask.is_file())
            inverter.progress, inverter.after_step = Told(job), None
            inverter.tune(picture, source, folder, mask if mask.is_file() else None)
            self._model = ({*(self._model or (set[str](),))[0], _opened_as(folder)}, inverter)

        return self.jobs.add(Job(name, "tune", work))

    def edit(self, name: str, target: str, each: Sequence[dict[str, Any]]) -> Job:
        """Edits of a run to one target, one for each of these settings; their files are the result."""
        store = self.store(name)

        def work(job: Job) -> list[Path]:
            inverter, files = self._to_edit(store.folder), list[Path]()
            frames = _Frames(inverter, store)
            inverter.progress, inverter.after_step = Told(job), frames.see
            for settings in each:
                files += Run(inverter, store.folder).edits([target], **settings)
                frames.save(files[-1])
            return files

        return self.jobs.add(Job(name, "edit", work))

    def stop(self, name: str) -> None:
        """Stop what is done with a run."""
        self.jobs.stop(name)

    # ---- results

    def edits(self, name: str) -> list[tuple[dict[str, Any], Path]]:
        """Every edit of a run, the newest first."""
        return self.store(name).edits()[::-1]

    def frames(self, edit: Path) -> list[tuple[Path, str]]:
        """The predicted pictures along an edit, with their timesteps; none for an edit made elsewhere."""
        found = sorted((edit.parents[1] / OWN / "frames" / edit.stem).glob("*.png"))
        return [(file, f"timestep {int(file.stem.partition('-')[2])}") for file in found]

    def settings_file(self, name: str, edit: dict[str, Any] | None) -> Path:
        """The settings of a run and of one of its edits, as the command line takes them."""
        store = self.store(name)
        command = f"kvinv edit --run {store.folder} --config settings.yaml"
        text = as_yaml(settings_again(store.read_run(), edit), command)
        write_atomically(file := self.folder / OWN / f"{name}-settings.yaml", text.encode())
        return file

    def archive(self, name: str) -> Path:
        """The run folder as one file."""
        folder, place = self.store(name).folder, self.folder / OWN / name
        return Path(shutil.make_archive(str(place), "zip", self.folder, folder.name))

    def editing(self, name: str | None = None) -> EditSettings:
        """What an edit is made with if nothing else is asked: as its run was, or a run made here will be."""
        run = self.record(name) if name else None
        known = {setting.name for setting in fields(EditSettings)}
        own = {key: value for key, value in (run or {}).get("editing", {}).items() if key in known}
        return replace(self._editing, **own)

    # ---- the model

    def _to_tune(self, masked: bool) -> KVInverter:
        """The model with the settings of this studio; with a mask, the variant that reads one."""
        key = f"tune {masked}"
        if self._model is None or key not in self._model[0]:
            self._model = None  # two at once may be too much for the memory
            settings = dict(self._settings)
            if masked and "attention" not in settings:
                settings["attention"] = MASKED
            self._model = ({key}, load(**settings))
        return self._model[1]

    def _to_edit(self, folder: Path) -> KVInverter:
        """The model that a run was tuned with."""
        key = _opened_as(folder)
        if self._model is None or key not in self._model[0]:
            self._model = None
            device = {name: self._settings[name] for name in ("accelerator",) if name in self._settings}
            self._model = ({key}, load(**{**settings_to_open(folder), **device}))
        return self._model[1]

    def _new_name(self, stem: str) -> str:
        """A name for a run that no other has."""
        slug = re.sub(r"[^\w]+", "-", stem.lower())[:40].strip("-_") or "picture"
        names = [slug, *(f"{slug}-{n}" for n in range(2, 10000))]
        return next(name for name in names if not (self.folder / name).exists())


class _Frames:
    """The pictures that an edit is heading for, every few steps."""

    def __init__(self, inverter: KVInverter, store: RunStore) -> None:
        self._model, self._store = inverter.model, store
        self._before: Tensor | None = None
        self._seen: list[tuple[int, Image.Image]] = []

    def see(self, i: int, t: int, z: Tensor) -> None:
        """Note what the latents before and after a step say of the picture."""
        denoiser = self._model.denoiser
        table, geometry = denoiser.table, geometry_of(self._store.read_run()["picture"])
        before = self._store.trajectory()[-1:].to(z) if i == 0 else self._before
        every = max(1, len(table) // FRAMES)
        if before is not None and table.has_effect(i) and (i % every == 0 or i == len(table) - 1):
            pixels = denoiser.backbone.decode(table.predicted_z_0(before[:1], z[:1], i))[0].cpu()
            self._seen.append((t, to_image(pixels, geometry)))
        self._before = z

    def save(self, edit: Path) -> None:
        """Write them beside the run's edits."""
        place = self._store.folder / OWN / "frames" / edit.stem
        shutil.rmtree(place, ignore_errors=True)
        for n, (t, picture) in enumerate(self._seen):
            write_png(place / f"{n:02d}-{t}.png", picture)
        self._seen = []


def _asked(folder: Path) -> Path:
    """Where a run that was begun here has its prompts."""
    return folder / OWN / "asked.json"


def _opened_as(folder: Path) -> str:
    """What a model must be to edit this run; settings of the edit itself make no difference."""
    found = settings_of(folder)
    of_edit = {setting.name for setting in fields(EditSettings)}
    model = {name: value for name, value in found["model"].items() if name not in of_edit}
    return json.dumps([model, found.get("trainer")], sort_keys=True)
