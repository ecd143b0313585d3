"""What the parts of the page call: the workbench is asked or told, and what comes is shown."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from kvinv_pl.app import subject
from kvinv_pl.app.again import as_made
from kvinv_pl.app.studio import looks
from kvinv_pl.app.studio.dials import dials, numbers, read
from kvinv_pl.app.studio.workbench import OWN, Workbench
from kvinv_pl.data import masks
from kvinv_pl.data.files import write_png
from kvinv_pl.data.pictures import open_picture
from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import Animal
from kvinv_pl.stages.settings import EditSettings

ANIMALS = (7, 12, 23)
"""Seeds of those that are there to try."""


class Calls:
    """The calls of one page; what a user is in the middle of is in the page itself."""

    def __init__(self, bench: Workbench, checkpoint: str, sam: str) -> None:
        """Take the workbench, and the models that find a subject by its word and by a click."""
        self.bench, self.checkpoint, self.sam = bench, checkpoint, sam

    # ---- a picture

    def take(self, event: gr.SelectData) -> tuple[Any, ...]:
        """An animal of the embedded world, with prompts and its word."""
        animal = Animal.sample(ANIMALS[event.index])
        other = "sitting" if animal.action == "running" else "running"
        file = write_png(self.bench.folder / OWN / f"{animal.species}-{animal.seed}.png", animal.render())
        return str(file), animal.prompt(), animal.prompt(other), animal.species, *self.unmask()

    def point(self, file: str | None, event: gr.SelectData) -> tuple[Image.Image, Any]:
        """The subject where the picture was clicked on."""
        image, (x, y) = _opened(file), event.index
        return _tinted(image, subject.at_points(image, [(x, y)], sam=self.sam))

    def by_word(self, file: str | None, word: str, source: str) -> tuple[Image.Image, Any]:
        """The subject by its word in the source prompt."""
        image = _opened(file)
        if not word.strip() or not source.strip():
            raise UserError("the subject: expected its word, and what the picture shows with that word in it")
        return _tinted(image, subject.of_word(image, word.strip(), source, self.checkpoint))

    def unmask(self) -> tuple[None, Any]:
        """No mask."""
        return None, gr.Image(visible=False)

    def begin(self, file: str | None, source: str, target: str, mask: Image.Image | None) -> Any:
        """A new run, which is the page's from here on."""
        if file is None:
            raise UserError("tune: expected a picture, got none: drop one, or take an animal")
        job = self.bench.tune(file, source.strip(), target.strip(), mask)
        return gr.Dropdown(choices=self.bench.runs(), value=job.run)

    # ---- a run

    def open_page(self, name: str | None) -> Any:
        """The runs of the folder; chosen is the one that is worked on, or else the newest."""
        found = self.bench.runs()
        busy = [each for each in found if (job := self.bench.jobs.of(each)) and not job.over.is_set()]
        return gr.Dropdown(
            choices=found, value=name if name in found else next(iter(busy + found), None)
        )  # fmt: skip

    def choose(self, name: str | None, at: Path | None = None) -> tuple[Any, ...]:
        """Everything of a run: where its dials stand, and what `refresh` shows."""
        if not name:
            return ("", *_stands(self.bench.editing()), *self.refresh(None))
        at = at or next((file for _, file in self.bench.edits(name)), None)
        record = self._record(name, at)
        target = record["target"] if record else next(iter(self.bench.prompts(name)[1]), "")
        return (target, *_stands(self.bench.editing(name), record), *self.refresh(name, at))

    def refresh(self, name: str | None, at: Path | str | None = None) -> tuple[Any, ...]:
        """What a run has by now, and one of its edits."""
        if not name:
            return "", "", None, [], [], *[gr.DownloadButton(interactive=False)] * 2, None
        bench, run = self.bench, self.bench.record(name)
        at = Path(at) if at else next((file for _, file in bench.edits(name)), None)
        picture = settings = gr.DownloadButton(interactive=False)
        if run is not None and "tuning" in run:
            file = bench.settings_file(name, self._record(name, at))
            settings = gr.DownloadButton(value=str(file), interactive=True)
        if at is not None:
            picture = gr.DownloadButton(value=str(at), interactive=True)
        frames = [(str(file), text) for file, text in bench.frames(at)] if at else []
        return (
            looks.progress(bench, bench.jobs.of(name)), looks.said(bench, name), looks.pair(bench, name, at),
            looks.gallery(bench, name), frames, picture, settings, at,
        )  # fmt: skip

    def pick(self, name: str, event: gr.SelectData) -> tuple[Any, ...]:
        """One of the edits."""
        return self.choose(name, self.bench.edits(name)[event.index][1])

    def tick(self, name: str | None, seen: Any) -> tuple[Any, Any]:
        """Progress, and what it is of, if that has changed."""
        job = self.bench.jobs.of(name) if name else None
        now = [name, job.kind, job.state] if job else [name, None, None]
        return looks.progress(self.bench, job), gr.skip() if now == seen else now

    def resume(self, name: str | None) -> None:
        """Go on tuning."""
        self.bench.resume(_required(name))

    def stop(self, name: str | None) -> None:
        """Stop; what is done is kept."""
        self.bench.stop(name or "")

    def edit(self, name: str | None, target: str, *stands: Any) -> Iterator[Any]:
        """An edit as the dials stand."""
        yield from self._edits(name, target, [read(stands)])

    def several(self, name: str | None, target: str, vary: str, values: str, *stands: Any) -> Iterator[Any]:
        """An edit for each value of one of the dials."""
        if not (found := numbers(values)):
            raise UserError("values to try: expected numbers between commas, got none")
        yield from self._edits(name, target, [{**read(stands), vary: value} for value in found])

    def _edits(self, name: str | None, target: str, each: list[dict[str, Any]]) -> Iterator[Any]:
        """Wait for edits; should the page be closed, they are made all the same."""
        run = _required(name)
        if not target.strip():
            raise UserError("edit: expected what the picture should become, got nothing")
        job = self.bench.edit(run, target.strip(), each)
        while not job.over.wait(0.2):
            yield looks.progress(self.bench, job), gr.skip()
        if job.state != "done":
            raise UserError(job.line)
        yield looks.progress(self.bench, job), str(job.result[-1])

    def suggest(self, vary: str, *stands: Any) -> str:
        """Values around the one that a dial stands at."""
        dial = next(dial for dial in dials() if dial.name == vary)
        return ", ".join(f"{value:g}" for value in dial.around(read(stands)[vary]))

    def pack(self, name: str | None) -> Any:
        """The run folder as one file."""
        return gr.DownloadButton(value=str(self.bench.archive(_required(name))), interactive=True)

    def _record(self, name: str, at: Path | None) -> dict[str, Any] | None:
        return next((record for record, file in self.bench.edits(name) if file == at), None)


def polite(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, whose UserErrors become a line on the page."""

    def told(error: UserError) -> gr.Error:
        return gr.Error(" ".join(str(error).split()), print_exception=False)

    @wraps(call)
    def steps(*args: Any) -> Iterator[Any]:
        try:
            yield from call(*args)
        except UserError as error:
            raise told(error) from None

    @wraps(call)
    def once(*args: Any) -> Any:
        try:
            return call(*args)
        except UserError as error:
            raise told(error) from None

    return steps if inspect.isgeneratorfunction(call) else once


def _required(name: str | None) -> str:
    if not name:
        raise UserError("expected a run, got none: tune a picture first, or choose one of the list")
    return name


def _opened(file: str | None) -> Image.Image:
    if file is None:
        raise UserError("the subject: expected a picture, got none: drop one first")
    return open_picture(file).image


def _tinted(image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Any]:
    """The mask, and the picture with the subject tinted."""
    share = mask.histogram()[255] / (mask.width * mask.height)
    label = f"The subject: {share:.0%} of the picture"
    return mask, gr.Image(masks.shown(image, mask), visible=True, label=label)


def _stands(settings: EditSettings, record: dict[str, Any] | None = None) -> list[Any]:
    """Where every dial stands: as an edit was made, or else as its run was."""
    found = asdict(settings) if record is None else as_made(record, asdict(settings))
    return [found[dial.name] for dial in dials()]
