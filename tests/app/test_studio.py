"""The studio: what its workbench does with a folder, and its page over the calls of gradio's client."""

from __future__ import annotations

import gc
import json
import shlex
import shutil
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import fits
import pytest
import yaml
from commands import kvinv, refused
from fits import SOURCE, TARGET

from kvinv_pl.app.edit_options import edit_options, kind_of, numbers, read
from kvinv_pl.app.studio.workbench.jobs import Job, JobProgress, Jobs
from kvinv_pl.app.studio.workbench.workbench import Workbench
from kvinv_pl.cli.commands.studio import read_model_settings
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.stages.settings import EditSettings

SETTINGS: dict[str, Any] = {**fits.QUICK, "optimizer": fits.adam(), "accelerator": "cpu"}


def bench_in(folder: Path) -> Workbench:
    return Workbench(folder, checkpoint=str(fits.checkpoint()), **SETTINGS)


def done(job: Job) -> Job:
    assert job.over.wait(120)
    return job


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, image: Path) -> Iterator[Workbench]:
    """A workbench with a tuned run and two edits of it."""
    found = bench_in(tmp_path_factory.mktemp("studio") / "runs")
    assert done(found.tune(image, SOURCE, TARGET)).state == "done"
    assert done(found.edit("my-cat", TARGET, [{"start": 0.0}, {"start": 1.0}])).state == "done"
    yield found
    found.jobs.close()


# ------------------------------------------------------------------------------------------ dials


def test_every_setting_of_an_edit_is_a_dial_with_its_help() -> None:
    found = {option.name: option for option in edit_options()}
    assert set(found) == {setting.name for setting in fields(EditSettings)}
    assert all(option.help for option in found.values())
    assert (found["start"].kind, found["start"].range) == ("slider", (0.0, 1.0))
    assert (found["reading"].kind, found["reading"].choices) == ("choice", ("frozen", "blend"))
    assert found["source_guidance"].kind == "number" and found["source_guidance"].default is None
    assert found["negative"].kind == "text"


def test_an_option_that_is_added_to_an_edit_is_a_dial_of_its_kind() -> None:
    made = [kind_of(kind)[0] for kind in (bool, int, float, str, int | None)]
    assert made == ["switch", "whole number", "number", "text", "whole number"]
    assert kind_of(Literal["a", "b"] | None) == ("choice", ("a", "b"))


def test_dials_are_read_as_settings_and_what_is_empty_is_as_loaded() -> None:
    stands = [
        {"start": 0.25, "guidance": 4, "subject": "", "negative": ""}.get(option.name)
        for option in edit_options()
    ]
    found = read(stands)
    assert found["start"] == 0.25 and found["guidance"] == 4.0
    assert found["subject"] is None and found["negative"] == "" and found["reading"] is None
    start = next(option for option in edit_options() if option.name == "start")
    assert start.around(0.0) == [0.0, 0.1, 0.2] and start.around(0.5) == [0.4, 0.5, 0.6, 0.7]
    assert numbers("0, 0.5; 1") == [0.0, 0.5, 1.0]
    with pytest.raises(UserError, match="expected numbers between commas, got 'half'"):
        numbers("half")


# ------------------------------------------------------------------------------------------ the workbench


def test_a_picture_is_tuned_and_edited_as_everywhere_else(bench: Workbench, tuned: RunStore) -> None:
    assert bench.runs() == ["my-cat"] and bench.prompts("my-cat") == (SOURCE, [TARGET])
    assert fits.tensors(bench.store("my-cat")) == fits.tensors(tuned)
    (edited,) = fits.edit(tuned, start=1.0)
    assert [record["start"] for record, _ in bench.edits("my-cat")] == [1.0, 0.0]
    newest = bench.edits("my-cat")[0][1]
    assert fits.opened(newest).tobytes() == edited.tobytes()
    assert [text for _, text in bench.frames("my-cat", newest)][-1] == "timestep 1"
    assert {fits.opened(file).size for file, _ in bench.frames("my-cat", newest)} == {(45, 30)}


def test_what_the_model_predicts_is_kept_along_a_tuning_and_along_every_edit(bench: Workbench) -> None:
    of_tuning, of_edit = bench.frames("my-cat"), bench.frames("my-cat", bench.edits("my-cat")[0][1])
    assert [text for _, text in of_tuning] == [text for _, text in of_edit]
    reconstruction = fits.opened(bench.store("my-cat").folder / "reconstruction.png")
    away = [fits.levels(fits.opened(file), reconstruction) for file, _ in of_tuning]
    assert away == sorted(away, reverse=True) and away[0] > away[-1] and away[-1] < 8


def test_its_settings_are_read_by_the_command_line_and_its_run_folder_is_packed(bench: Workbench) -> None:
    record, _ = bench.edits("my-cat")[0]
    file = bench.settings_file("my-cat", record)
    text = file.read_text(encoding="utf-8")
    assert text.startswith(f"# kvinv edit --run {bench.folder / 'my-cat'} --config settings.yaml\n")
    assert yaml.safe_load(text)["model"]["start"] == 1.0
    before = len(bench.edits("my-cat"))
    answer = kvinv("edit", "--run", bench.folder / "my-cat", "--config", file)
    assert answer.code == 0 and "exists with these settings" in answer.err
    assert len(bench.edits("my-cat")) == before
    packed = bench.archive("my-cat")
    assert packed.is_relative_to(bench.folder)
    with zipfile.ZipFile(packed) as archive:
        assert "my-cat/run.json" in archive.namelist()


def test_the_command_above_its_settings_is_one_that_a_shell_takes(bench: Workbench, tmp_path: Path) -> None:
    folder = tmp_path / "my runs"
    shutil.copytree(bench.folder / "my-cat", folder / "my-cat")
    other = bench_in(folder)
    first = other.settings_file("my-cat", None).read_text(encoding="utf-8").splitlines()[0]
    other.jobs.close()
    assert shlex.split(first)[1:5] == ["kvinv", "edit", "--run", str(folder / "my-cat")]


def test_a_stopped_tuning_keeps_what_is_done_and_goes_on_to_the_same(
    tmp_path: Path, image: Path, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, show = bench_in(tmp_path / "runs"), JobProgress.show

    def stop_after_a_timestep(told: JobProgress, detail: str) -> None:
        if told._task.startswith("tuning") and told.share > 0.3:
            told.job.stopping.set()
        show(told, detail)

    monkeypatch.setattr(JobProgress, "show", stop_after_a_timestep)
    job = done(other.tune(image, SOURCE))
    assert job.state == "stopped" and "what is done is kept" in job.line
    assert 0 < len(other.store("my-cat").done()) < 3
    monkeypatch.undo()
    assert done(other.resume("my-cat")).state == "done"
    assert fits.tensors(other.store("my-cat")) == fits.tensors(bench.store("my-cat"))
    other.jobs.close()


def test_jobs_wait_for_one_another_and_one_that_fails_says_why_in_a_line() -> None:
    jobs, go = Jobs(), threading.Event()
    first = jobs.add(Job("a", "tune", lambda job: go.wait(60)))
    failing = jobs.add(Job("b", "edit", lambda job: 1 / 0))
    stopped = jobs.add(Job("c", "edit", lambda job: None))
    assert (jobs.before(first), jobs.before(failing), jobs.before(stopped)) == (0, 1, 2)
    jobs.stop("c")
    go.set()
    assert [done(job).state for job in (first, failing, stopped)] == ["done", "failed", "stopped"]
    assert failing.line == "ZeroDivisionError: division by zero" and jobs.before(failing) == 0
    jobs.close()


def test_what_is_no_picture_or_no_run_is_refused_and_leaves_nothing(bench: Workbench, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png"):
        bench.tune(tmp_path / "broken.png", SOURCE)
    for name in ("nowhere", "../pictures", ".studio"):
        with pytest.raises(UserError, match="choose one from the list"):
            bench.store(name)
    assert bench.runs() == ["my-cat"]
    failed = done(bench.edit("my-cat", TARGET, [{"start": 2.0}]))
    assert failed.state == "failed" and "start: expected a share of the steps" in failed.line


# ------------------------------------------------------------------------------------------ the command


def test_a_configuration_file_says_what_pictures_are_tuned_with(tmp_path: Path) -> None:
    config = tmp_path / "model.yaml"
    config.write_text("model: {steps: 7, attention: v_only, start: 0.2}\ntrainer: {accelerator: gpu}\n")
    found = read_model_settings(config)
    assert (found["steps"], found["start"], set(found)) == (7, 0.2, {"steps", "attention", "start"})
    for text, line in {
        "data: {}": "expected a section model",
        "model: {stepz: 7}": "stepz",
        "model: [": "model.yaml",
    }.items():
        config.write_text(text)
        with pytest.raises(UserError, match=line) as caught:
            read_model_settings(config)
        assert "\n" not in str(caught.value)
    refused(kvinv("studio", "--port", "many"), "--port")


# ------------------------------------------------------------------------------------------ the page


# gradio leaves event loops and sockets to the garbage collector, and asks pandas in an old way
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:.*no_silent_downcasting"
)
def test_the_page_answers_gradios_client_and_says_what_is_wrong(
    bench: Workbench, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(bench.folder / ".studio" / "uploads"))
    pytest.importorskip("gradio")
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    from kvinv_pl.app.studio.page import page

    blocks = page(bench, str(fits.checkpoint()))
    _, url, _ = blocks.launch(
        prevent_thread_lock=True, quiet=True, ssr_mode=False, allowed_paths=[str(bench.folder)]
    )
    try:
        client = Client(url, verbose=False, download_files=str(tmp_path / "got"))
        assert client.predict(None, api_name="/runs")["value"] == "my-cat"
        target, *rest = client.predict("my-cat", api_name="/open")
        assert target == TARGET and "dB" in str(rest)
        stands = rest[: len(edit_options())]
        assert stands[[option.name for option in edit_options()].index("start")] == 1.0
        told = client.predict("my-cat", "a dog", *stands, api_name="/edit")
        assert "done" in told and bench.edits("my-cat")[0][0]["target"] == "a dog"
        client.predict("my-cat", "a dog", "start", "0, 0.5", *stands, api_name="/candidates")
        assert [record["start"] for record, _ in bench.edits("my-cat")][:2] == [0.5, 0.0]
        with pytest.raises(AppError, match="expected what the picture should become"):
            client.predict("my-cat", " ", *stands, api_name="/edit")
        chosen = client.predict(handle_file(str(image)), SOURCE, "", api_name="/tune")
        assert (
            chosen["value"] == "my-cat-2" and done(bench.jobs.of("my-cat-2") or pytest.fail()).state == "done"
        )
        (tmp_path / "broken.png").write_bytes(b"no picture")
        with pytest.raises(AppError, match="broken"):
            client.predict(handle_file(str(tmp_path / "broken.png")), SOURCE, "", api_name="/tune")
        assert {path.name for path in bench.folder.iterdir()} == {"my-cat", "my-cat-2", ".studio"}
    finally:
        blocks.close()
        gc.collect()


def test_a_folder_is_opened_again_with_its_runs_by_another_workbench(bench: Workbench) -> None:
    again = bench_in(bench.folder)
    assert set(again.runs()) == set(bench.runs())
    before = len(again.edits("my-cat"))
    assert done(again.edit("my-cat", "a horse", [{}])).state == "done"
    assert len(bench.edits("my-cat")) == before + 1
    assert json.loads((bench.folder / "my-cat" / ".studio" / "asked.json").read_text())["source"] == SOURCE
    assert len(again.frames("my-cat", again.edits("my-cat")[0][1])) == 3
    again.jobs.close()
