"""What TensorBoard shows of a fit."""

import warnings
from typing import Any

import fits
import pytest
import torch
from fits import SOURCE

from kvinv_pl.data.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.stages.progress import log_picture
from kvinv_pl.training.datamodule import SourceImages


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
