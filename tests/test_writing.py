"""What Lightning and TensorBoard cannot write, in this thread and in theirs."""

import threading
from pathlib import Path

import pytest

from kvinv_pl.errors import NoRoomError, UserError
from kvinv_pl.writing import reported

FULL = OSError(28, "No space left on device")


def run(error: Exception) -> None:
    """Raise it in a thread of its own, and wait for that."""

    def fail() -> None:
        raise error

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


def test_what_cannot_be_written_is_one_line_with_the_file_or_the_folder(tmp_path: Path) -> None:
    named = FileNotFoundError(2, "No such file", "events.out")
    for error, place in ((FULL, str(tmp_path)), (named, "events.out")):
        with pytest.raises(NoRoomError, match=f"cannot write {place}: No .*; make room"), reported(tmp_path):
            raise error


def test_what_a_thread_could_not_write_is_said_once_all_else_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = False
    with pytest.raises(UserError, match="cannot write the logs: No space left on device"), reported(tmp_path):
        run(FULL)
        run(FULL)
        done = True
    assert done and not capsys.readouterr().err


def test_a_threads_other_errors_go_where_they_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = list[object]()
    monkeypatch.setattr(threading, "excepthook", lambda told: heard.append(told.exc_value))
    error = RuntimeError("a bug")
    with reported(tmp_path):
        run(error)
    run(FULL)
    assert heard == [error, FULL]
