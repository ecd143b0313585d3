"""The runs of a folder, and what can be done with them: tune, edit, look. A page only shows this."""

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from kvinv_pl.api import Run
from kvinv_pl.app.reports.reproduce import as_yaml, reproducing_settings
from kvinv_pl.app.studio.workbench.frames import FRAMES, STUDIO_DIR, frames_of, save_frames
from kvinv_pl.app.studio.workbench.jobs import Job, JobProgress, Jobs
from kvinv_pl.app.studio.workbench.model_cache import ModelCache
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.runs.files import write_atomically, write_png
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.stages.editing.predicted_x0 import Strip
from kvinv_pl.stages.settings import EditSettings


class Workbench:
    """A folder with its runs, one model, and a queue; nothing is written outside the folder."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        """Make the folder of the runs; the settings are arguments of `load` for new pictures."""
        self.folder = folder.resolve()
        (self.folder / STUDIO_DIR).mkdir(parents=True, exist_ok=True)
        self.jobs, self._model = Jobs(), ModelCache(settings)

    # ---- runs

    def runs(self) -> list[str]:
        """The runs of the folder, the newest first; those that have only begun, too."""
        found = [
            each
            for each in self.folder.iterdir()
            if _prompts_file(each).is_file() or RunStore(each).has_run()
        ]
        return [each.name for each in sorted(found, key=lambda each: -each.stat().st_mtime_ns)]

    def store(self, name: str) -> RunStore:
        """The run of this name, which is one of the folder's."""
        if name not in self.runs():
            raise UserError(f"no run {name!r} in {self.folder}: choose one from the list")
        return RunStore(self.folder / name)

    def record(self, name: str) -> dict[str, Any] | None:
        """Its run.json, if there is one yet."""
        store = self.store(name)
        return store.read_run() if store.has_run() else None

    def prompts(self, name: str) -> tuple[str, list[str]]:
        """What a run's picture shows, and what it was to become."""
        if (file := _prompts_file(self.store(name).folder)).is_file():
            prompts = json.loads(file.read_text(encoding="utf-8"))
            return prompts["source"], prompts["targets"]
        run = self.store(name).read_run()
        return run["source"], run.get("targets", [])

    # ---- work

    def tune(
        self, picture: Path | str, source: str, target: str = "", mask: Image.Image | None = None
    ) -> Job:
        """A new run of a picture, which is copied into the folder first."""
        open_picture(picture)  # refused now, if it is none
        name = self._new_name(Path(picture).stem)
        own = self.folder / name / STUDIO_DIR
        (own / "picture").mkdir(parents=True)
        shutil.copyfile(picture, own / "picture" / Path(picture).name)
        if mask is not None:
            write_png(own / "mask.png", mask)
        prompts = {"source": source, "targets": [target] if target else []}
        write_atomically(_prompts_file(own.parent), json.dumps(prompts, ensure_ascii=False).encode())
        return self.resume(name)

    def resume(self, name: str) -> Job:
        """Tune a run to the end, from where it was stopped."""
        folder, (source, _) = self.store(name).folder, self.prompts(name)
        picture = next((folder / STUDIO_DIR / "picture").glob("*"), None)
        if picture is None:
            raise UserError(
                f"{name} was not started in the studio: resume it with its own `kvinv fit` command"
            )
        mask = folder / STUDIO_DIR / "mask.png"

        def work(job: Job) -> None:
            inverter = self._model.for_tuning(mask.is_file())
            given = mask if mask.is_file() else None
            inverter.tune(picture, source, folder, given, progress=JobProgress(job))
            self._model.add_run(folder)
            strip = Strip(lambda: inverter.model.denoiser, RunStore(folder), FRAMES)
            strip.read_tuning()
            save_frames(strip, folder, None)

        return self.jobs.add(Job(name, "tune", work))

    def edit(self, name: str, target: str, each: Sequence[dict[str, Any]]) -> Job:
        """Edits of a run to one target, one for each of these settings; their files are the result."""
        store = self.store(name)

        def work(job: Job) -> list[Path]:
            inverter, files = self._model.for_editing(store.folder), list[Path]()
            strip = Strip(lambda: inverter.model.denoiser, store, FRAMES)
            run, progress = Run(inverter, store.folder), JobProgress(job)
            for settings in each:
                files += run.edits([target], progress=progress, after_step=strip.see, **settings)
                save_frames(strip, store.folder, files[-1])
            return files

        return self.jobs.add(Job(name, "edit", work))

    def stop(self, name: str) -> None:
        """Stop what is done with a run."""
        self.jobs.stop(name)

    # ---- results

    def edits(self, name: str) -> list[tuple[dict[str, Any], Path]]:
        """Every edit of a run, the newest first."""
        return self.store(name).edits()[::-1]

    def frames(self, name: str, edit: Path | None = None) -> list[tuple[Path, str]]:
        """The predicted pictures along one of its edits, or its tuning, with their timesteps."""
        return frames_of(self.store(name).folder, edit)

    def settings_file(self, name: str, edit: dict[str, Any] | None) -> Path:
        """The settings of a run and of one of its edits, as the command line takes them."""
        store = self.store(name)
        command = shlex.join(["kvinv", "edit", "--run", str(store.folder), "--config", "settings.yaml"])
        text = as_yaml(reproducing_settings(store.read_run(), edit), command)
        write_atomically(file := self.folder / STUDIO_DIR / f"{name}-settings.yaml", text.encode())
        return file

    def archive(self, name: str) -> Path:
        """The run folder as one file."""
        folder, place = self.store(name).folder, self.folder / STUDIO_DIR / name
        return Path(shutil.make_archive(str(place), "zip", self.folder, folder.name))

    def editing(self, name: str | None = None) -> EditSettings:
        """What an edit is made with if nothing else is asked: as its run was, or a run made here will be."""
        run = self.record(name) if name else None
        known = {setting.name for setting in fields(EditSettings)}
        own = {key: value for key, value in (run or {}).get("editing", {}).items() if key in known}
        return replace(self._model.editing, **own)

    def _new_name(self, stem: str) -> str:
        slug = re.sub(r"[^\w]+", "-", stem.lower())[:40].strip("-_") or "picture"
        names = [slug, *(f"{slug}-{n}" for n in range(2, 10000))]
        return next(name for name in names if not (self.folder / name).exists())


def _prompts_file(folder: Path) -> Path:
    """Where a run that was begun here has its prompts."""
    return folder / STUDIO_DIR / "asked.json"
