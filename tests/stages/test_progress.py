"""What a run tells the person who waits for it, and what TensorBoard shows of a fit."""

import io
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import fits
import pytest
import torch
from fits import SOURCE

from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.stages import progress
from kvinv_pl.stages.progress import Progress
from kvinv_pl.stages.tuning.results import log_picture
from kvinv_pl.training.datamodule import SourceImages


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time passes when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_on_a_terminal_one_line_is_rewritten_with_stage_step_detail_and_time_left(
    clock: Callable[[float], None],
) -> None:
    stream = Terminal()
    watch = Progress(stream)
    watch.begin("tuning", "cat.png", 50)
    for _ in range(10):
        clock(2)
        watch.advance("timestep 481, inner step 3, loss 1.2e-05")
    last = stream.getvalue().split("\r\x1b[2K")[-1]
    assert last == "tuning cat.png: 10/50 timestep 481, inner step 3, loss 1.2e-05, 1:20 min left"
    assert "\n" not in stream.getvalue()


def test_a_terminal_is_not_redrawn_more_often_than_a_person_reads(clock: Callable[[float], None]) -> None:
    stream = Terminal()
    watch = Progress(stream)
    watch.begin("tuning", "cat.png", 50)
    for _ in range(1000):
        clock(0.001)
        watch.show("inner step")
    assert stream.getvalue().count("\r") <= 10


def test_a_line_never_wraps(clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((40, 20)))
    stream = Terminal()
    watch = Progress(stream)
    watch.begin("tuning", "a-picture-with-a-long-name.png", 50)
    clock(1)
    watch.show("timestep 481, inner step 3, loss 1.2e-05")
    assert len(stream.getvalue().removeprefix("\r\x1b[2K")) == 39


def test_in_a_file_lines_stay_and_so_come_seldom(clock: Callable[[float], None]) -> None:
    stream = io.StringIO()
    watch = Progress(stream)
    watch.begin("tuning", "cat.png", 50)
    for _ in range(45):
        clock(2)
        watch.advance("loss 1e-05")
    watch.finish("reconstruction 43.6 dB")
    assert stream.getvalue().splitlines() == [
        "tuning cat.png: 15/50 loss 1e-05, 1:10 min left",
        "tuning cat.png: 30/50 loss 1e-05, 40.0 s left",
        "tuning cat.png: 45/50 loss 1e-05, 10.0 s left",
        "tuning cat.png: 45 steps in 1:30 min, reconstruction 43.6 dB",
    ]


def test_the_finished_line_replaces_the_running_one(clock: Callable[[float], None]) -> None:
    stream = Terminal()
    watch = Progress(stream)
    watch.begin("editing", "cat.png", 1)
    clock(0.5)
    watch.advance("timestep 1")
    watch.finish()
    watch.note("look at sheet.png")
    assert re.split(r"\r\x1b\[2K", stream.getvalue())[-2:] == [
        "editing cat.png: 1 step in 0.5 s\n",
        "look at sheet.png\n",
    ]


def test_quiet_is_quiet(clock: Callable[[float], None]) -> None:
    stream = Terminal()
    watch = Progress(stream, quiet=True)
    watch.begin("tuning", "cat.png", 2)
    clock(100)
    watch.advance("loss")
    watch.finish()
    watch.note("look")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "0.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1:00 min"),
        (187.2, "3:07 min"),
        (3599.9, "1:00 h"),
        (8100.0, "2:15 h"),
    ],
)
def test_time_as_a_person_says_it(seconds: float, said: str) -> None:
    assert progress.format_seconds(seconds) == said


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunStore, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of tensorboard's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path_factory.mktemp("logged")
    data = SourceImages(str(fits.picture(folder / "cat.png")), SOURCE, out=str(folder / "run"))
    module = fits.model(required_psnr=99.0, retries=1)
    fits.trainer(logger=True, x_0_every=2).fit(module, datamodule=data)
    log = EventAccumulator(str(folder / "run" / "logs"))
    log.Reload()
    return RunStore(folder / "run"), log


def test_figures_of_the_reconstruction_are_there_for_every_attempt(logged: tuple[RunStore, Any]) -> None:
    store, log = logged
    record = store.read_run()["reconstruction"]
    events = log.Scalars("run/psnr_to_round_trip")
    assert [event.step for event in events] == [0, 1]
    assert max(event.value for event in events) == pytest.approx(record["psnr_to_round_trip"])


def test_every_other_phase_has_its_predicted_picture_and_every_one_the_memory(
    logged: tuple[RunStore, Any],
) -> None:
    _, log = logged
    shown = log.Images("run/predicted_x_0")
    assert {event.step for event in shown} == {0, 2}
    assert all((event.width, event.height) == (16, 16) for event in shown)
    assert all(event.value > 0.01 for event in log.Scalars("run/peak_memory_gib"))


def test_a_logger_that_takes_no_pictures_is_given_none() -> None:
    log_picture([object()], "cat/predicted_x_0", 0, torch.zeros(3, 2, 2))


def test_a_number_of_timesteps_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match="x_0_every: expected 0 or more, got -1"):
        fits.trainer(x_0_every=-1)
