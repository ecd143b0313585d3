import io
import os
import re
from collections.abc import Callable

import pytest

from kvinv_pl.stages import progress
from kvinv_pl.stages.progress import Progress


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
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda: os.terminal_size((40, 20)))
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
        "editing cat.png: 1 steps in 0.5 s\n",
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
    assert progress._clock(seconds) == said
