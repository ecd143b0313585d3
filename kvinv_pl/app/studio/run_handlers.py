"""Event handlers of the page's right side: a run, its edits, and what there is of them to take along."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr

from kvinv_pl.app.edit_options import edit_options, numbers, read
from kvinv_pl.app.reports.reproduce import full_settings
from kvinv_pl.app.studio import views
from kvinv_pl.app.studio.workbench.workbench import Workbench
from kvinv_pl.errors import UserError
from kvinv_pl.stages.settings import EditSettings


class RunHandlers:
    """The event handlers of a run; which one, the page says each time."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench

    def open_page(self, name: str | None) -> Any:
        """The runs of the folder; chosen is the one that is worked on, or else the newest."""
        found = self.bench.runs()
        busy = [each for each in found if (job := self.bench.jobs.of(each)) and not job.over.is_set()]
        return gr.Dropdown(
            choices=found, value=name if name in found else next(iter(busy + found), None)
        )  # fmt: skip

    def choose(self, name: str | None, at: Path | None = None) -> tuple[Any, ...]:
        """Everything of a run: the values of its options, and what `refresh` shows."""
        if not name:
            return ("", *_option_values(self.bench.editing()), *self.refresh(None))
        at = at or next((file for _, file in self.bench.edits(name)), None)
        record = self._record(name, at)
        target = record["target"] if record else next(iter(self.bench.prompts(name)[1]), "")
        return (target, *_option_values(self.bench.editing(name), record), *self.refresh(name, at))

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
        frames = [(str(file), text) for file, text in bench.frames(name, at)]
        return (
            views.progress(bench, bench.jobs.of(name)), views.run_summary(bench, name),
            views.slider_pair(bench, name, at), views.gallery(bench, name), frames, picture, settings, at,
        )  # fmt: skip

    def pick(self, name: str, event: gr.SelectData) -> tuple[Any, ...]:
        """One of the edits."""
        return self.choose(name, self.bench.edits(name)[event.index][1])

    def tick(self, name: str | None, seen: Any) -> tuple[Any, Any]:
        """Progress, and what it is of, if that has changed."""
        job = self.bench.jobs.of(name) if name else None
        now = [name, job.kind, job.state] if job else [name, None, None]
        return views.progress(self.bench, job), gr.skip() if now == seen else now

    def resume(self, name: str | None) -> None:
        """Go on tuning."""
        self.bench.resume(_required(name))

    def stop(self, name: str | None) -> None:
        """Stop; what is done is kept."""
        self.bench.stop(name or "")

    def edit(self, name: str | None, target: str, *options: Any) -> Iterator[Any]:
        """An edit with these values of the options."""
        yield from self._edits(name, target, [read(options)])

    def several(self, name: str | None, target: str, vary: str, values: str, *options: Any) -> Iterator[Any]:
        """An edit for each value of one of the options."""
        if not (found := numbers(values)):
            raise UserError("values to try: expected numbers between commas, got none")
        yield from self._edits(name, target, [{**read(options), vary: value} for value in found])

    def _edits(self, name: str | None, target: str, each: list[dict[str, Any]]) -> Iterator[Any]:
        """Wait for edits; should the page be closed, they are made all the same."""
        run = _required(name)
        if not target.strip():
            raise UserError("edit: expected what the picture should become, got nothing")
        job = self.bench.edit(run, target.strip(), each)
        while not job.over.wait(0.2):
            yield views.progress(self.bench, job), gr.skip()
        if job.state != "done":
            raise UserError(job.line)
        yield views.progress(self.bench, job), str(job.result[-1])

    def suggest(self, vary: str, *options: Any) -> str:
        """Values around that of an option."""
        option = next(option for option in edit_options() if option.name == vary)
        return ", ".join(f"{value:g}" for value in option.around(read(options)[vary]))

    def pack(self, name: str | None) -> Any:
        """The run folder as one file."""
        return gr.DownloadButton(value=str(self.bench.archive(_required(name))), interactive=True)

    def _record(self, name: str, at: Path | None) -> dict[str, Any] | None:
        return next((record for record, file in self.bench.edits(name) if file == at), None)


def _required(name: str | None) -> str:
    if not name:
        raise UserError("expected a run, got none: tune a picture first, or choose one from the list")
    return name


def _option_values(settings: EditSettings, record: dict[str, Any] | None = None) -> list[Any]:
    """The value of every option: as an edit was made, or else as its run was."""
    found = asdict(settings) if record is None else full_settings(record, asdict(settings))
    return [found[option.name] for option in edit_options()]
