"""What Lightning and TensorBoard cannot write, in this thread and in theirs."""

import threading
from pathlib import Path
from typing import Any

import fits
import pytest
from lightning import Callback, LightningModule, Trainer

from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import NoRoomError
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.logs import reporting_write_errors

FULL = OSError(28, "No space left on device")


def run(error: Exception, module: str) -> None:
    """Raise it in a thread of its own, from a function of this module, and wait for that."""
    there: dict[str, Any] = {"__name__": module, "error": error}
    exec("def fail():\n    raise error", there)
    thread = threading.Thread(target=there["fail"])
    thread.start()
    thread.join()


def test_what_cannot_be_written_is_one_line_with_the_file_or_the_folder(tmp_path: Path) -> None:
    named = FileNotFoundError(2, "No such file", "events.out")
    for error, place in ((FULL, str(tmp_path)), (named, "events.out")):
        with (
            pytest.raises(NoRoomError, match=f"cannot write {place}: No .*; make room"),
            reporting_write_errors(tmp_path),
        ):
            raise error


def test_what_tensorboards_threads_could_not_write_is_kept_for_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with reporting_write_errors(tmp_path) as lost:
        run(FULL, "tensorboard.summary.writer.event_file_writer")
    assert lost == [FULL] and not capsys.readouterr().err


class LastWords(Callback):
    """TensorBoard's thread fails when nobody writes any more, who would be told."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run(FULL, "tensorboard.writer")


def test_lost_logs_are_said_and_fail_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = SourceImages(str(fits.picture(tmp_path / "in.png")), fits.SOURCE, out=str(tmp_path / "run"))
    fits.trainer(callbacks=[LastWords()]).fit(fits.model(), datamodule=data)
    said = capsys.readouterr().err.splitlines()
    assert set(said) == {"some logs were lost: No space left on device"} and len(said) == 1
    assert len(RunStore(tmp_path / "run").done()) == 3


def test_other_threads_and_other_errors_go_where_they_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = list[object]()
    monkeypatch.setattr(threading, "excepthook", lambda told: heard.append(told.exc_value))
    bug, broken = RuntimeError("a bug"), BrokenPipeError(32, "Broken pipe")
    with reporting_write_errors(tmp_path) as lost:
        run(bug, "tensorboard.writer")
        run(broken, "somebodys_server")
    run(FULL, "tensorboard.writer")
    assert heard == [bug, broken, FULL] and not lost
