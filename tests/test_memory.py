"""How many pictures are tuned side by side where nobody has said how many."""

from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from fits import SOURCE

from kvinv_pl import memory
from kvinv_pl.data import SourceImages
from kvinv_pl.failures import Failures
from kvinv_pl.module import KVInversion


@pytest.fixture(scope="module")
def module() -> KVInversion:
    made = fits.model(slots="auto")
    made.load_backbone(torch.float32)
    return made


def test_what_a_slot_takes_grows_with_the_picture_and_with_the_branches(module: KVInversion) -> None:
    small, large = (memory.bytes_per_slot(module.network, (side, side), 2.0) for side in (8, 16))
    one_branch = memory.bytes_per_slot(module.network, (8, 8), 1.0)
    assert one_branch < small < large
    psi = sum(value.nbytes for value in module.network.psi.parameters())
    assert one_branch > memory.COPIES * psi > 0


@pytest.mark.parametrize(
    ("fitting", "pictures", "chosen"), [(0.5, 5, 1), (3.2, 5, 3), (3.2, 2, 2), (1e6, 1000, memory.MOST)]
)
def test_as_many_as_fit_are_tuned_side_by_side(
    fitting: float, pictures: int, chosen: int, module: KVInversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = memory.bytes_per_slot(module.network, (8, 8), 2.0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(fitting * each / memory.SHARE))
    slots, reason = memory.side_by_side(module.network, (8, 8), 2.0, pictures)
    assert slots == chosen and "are free" in reason


def test_this_machine_has_memory_free() -> None:
    assert 2**20 < memory.free_bytes(torch.device("cpu")) < 2**50


def test_what_was_chosen_is_said_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate("abc"):
        fits.picture(tmp_path / "in" / f"{name}.png", seed=seed)
    data = SourceImages(str(tmp_path / "in"), out=str(tmp_path / "out"))
    fits.trainer(quiet=False).fit(fits.model(slots="auto", steps=1, inner_steps=1), datamodule=data)
    said = capsys.readouterr().err
    assert "slots: 3 of 3 pictures side by side (each takes about " in said and "tuning 3 pictures" in said


def test_every_device_has_pictures(tmp_path: Path) -> None:
    for seed, name in enumerate("abcde"):
        fits.picture(tmp_path / "in" / f"{name}.png", seed=seed)
    data = SourceImages(str(tmp_path / "in"), SOURCE, out=str(tmp_path / "out"))
    trainer = fits.trainer(devices=2)
    module = fits.model(slots="auto", steps=1)
    module.load_backbone(torch.float32)
    shares = trainer._shares(module, data, ["fit"], Failures(5))
    assert [members for _, members in shares] == [[0, 1, 2], [3, 4]]


def test_an_optimiser_that_takes_its_own_steps_gets_its_pictures_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate("ab"):
        fits.picture(tmp_path / "in" / f"{name}.png", seed=seed)
    data = SourceImages(str(tmp_path / "in"), out=str(tmp_path / "out"))
    settings: dict[str, Any] = {"slots": "auto", "steps": 1, "inner_steps": 1}
    fits.trainer(quiet=False).fit(fits.model(optimizer=torch.optim.LBFGS, **settings), datamodule=data)
    assert all(work.store.done() == {0} for work in data.works)
    assert "tuning b.png" in capsys.readouterr().err
