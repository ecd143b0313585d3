"""HTML and text that show a run and its job on the page."""

from html import escape
from pathlib import Path
from typing import Any

from kvinv_pl.app.reports.summaries import certificate, search_summary, settings_of_edit
from kvinv_pl.app.studio.workbench.jobs import Job
from kvinv_pl.app.studio.workbench.workbench import Workbench
from kvinv_pl.data.runs.edits import CHOSEN, search_of


def progress(bench: Workbench, job: Job | None) -> str:
    """How far the work is, as HTML; it is announced where it changes its state."""
    if job is None:
        return ""
    before = bench.jobs.before(job)
    first = f"waiting; {before} before it" if job.state == "waiting" else job.line or job.state
    share = {"done": 1.0, "waiting": 0.0}.get(job.state, job.share)
    line = first if job.state in ("waiting", "running") else f"{job.state}: {first}"
    return (
        f'<div class="kv-bar" role="progressbar" aria-valuenow="{share:.0%}" aria-label="{job.kind}">'
        f'<div style="width:{share:.1%}"></div></div><p class="kv-line">{escape(line)}</p>'
    )


def run_summary(bench: Workbench, name: str) -> str:
    """The certificate of a run in plain words, and its notes."""
    run = bench.record(name)
    if run is None:
        return "The picture is not inverted yet."
    notes = [f"Note: {note}." for note in run["picture"]["notes"]]
    return "\n\n".join([*certificate(run), *notes])


def gallery(bench: Workbench, name: str) -> list[tuple[str, str]]:
    """The edits of a run, each with its caption."""
    return [(str(file), caption(record)) for record, file in bench.edits(name)]


def caption(record: dict[str, Any]) -> str:
    """The target and the settings of an edit, and what a search thought of it."""
    settings = ", ".join(f"{name} {value}" for name, value in settings_of_edit(record).items())
    chosen = [CHOSEN] if search_of(record).get("chosen") else []
    found = [text for text in (*chosen, search_summary(record)) if text]
    return "; ".join([f"{record['target']} ({settings})", *found])


def slider_pair(bench: Workbench, name: str, edit: Path | None) -> tuple[str, str] | None:
    """What the slider compares: the source and an edit, or its reconstruction; None before there is one."""
    folder = bench.store(name).folder
    after = edit or folder / "reconstruction.png"
    return (str(folder / "source.png"), str(after)) if after.is_file() else None
