"""What half precision changes: little, and nothing of what is held from one phase to the next."""

from pathlib import Path
from pydoc import locate
from typing import Any

import fits
import pytest
import torch
from fits import SOURCE
from lightning import Callback, LightningModule, Trainer

from kvinv_pl.data.images.geometry import as_pixels, psnr
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.data.runs.tensors import DTYPES
from kvinv_pl.errors import UserError
from kvinv_pl.training.datamodule import SourceImages

AGREE = 30.0
"""dB between the reconstructions of fp32 and of bf16-mixed, at least."""


def test_fp32_and_bf16_mixed_agree(image: Path, tmp_path: Path) -> None:
    shown, worth = [], []
    for precision in ("32-true", "bf16-mixed"):
        data = SourceImages(str(image), SOURCE, out=str(tmp_path / precision))
        fits.trainer(precision=precision).fit(fits.model(inner_steps=10), datamodule=data)
        store = RunStore(data.out)
        shown.append(as_pixels(fits.opened(store.folder / "reconstruction.png")))
        worth.append(store.read_run()["reconstruction"]["psnr_to_source"])
    assert psnr(*shown) > AGREE
    assert abs(worth[0] - worth[1]) < 0.5


class Scales(Callback):
    """The loss scaling of every inner step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        scaler: Any = trainer.precision_plugin.scaler  # pyright: ignore[reportAttributeAccessIssue]
        self.seen.append((trainer.current_epoch, batch_idx, scaler.get_scale()))
        scaler.update(1024.0)  # as if it had overflown


@pytest.mark.parametrize("name", ["torch.optim.LBFGS", "kvinv_pl.optimizers.GaussNewtonDescent"])
def test_loss_scaling_is_refused_where_the_optimiser_evaluates_the_loss(
    name: str, image: Path, tmp_path: Path
) -> None:
    trainer = fits.trainer(precision="bf16-mixed")
    plugin: Any = trainer.precision_plugin
    plugin.scaler = torch.amp.GradScaler("cpu")  # pyright: ignore[reportPrivateImportUsage]
    model = fits.model(optimizer=locate(name))
    with pytest.raises(UserError, match=f"16-mixed scales the loss, and {name.split('.')[-1]} evaluates it"):
        trainer.fit(model, datamodule=SourceImages(str(image), SOURCE, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_loss_scaling_starts_anew_in_every_phase_and_changes_no_result(image: Path, tmp_path: Path) -> None:
    scales = Scales()
    trainer = fits.trainer(precision="bf16-mixed", callbacks=[scales])
    plugin: Any = trainer.precision_plugin
    plugin.scaler = torch.amp.GradScaler("cpu")  # pyright: ignore[reportPrivateImportUsage]
    trainer.fit(fits.model(), datamodule=SourceImages(str(image), SOURCE, out=str(tmp_path / "scaled")))
    assert [scale for _, step, scale in scales.seen if step == 0] == [65536.0] * 3
    assert [scale for _, step, scale in scales.seen if step > 0] == [1024.0] * 6
    plain = fits.trainer(precision="bf16-mixed")
    plain.fit(fits.model(), datamodule=SourceImages(str(image), SOURCE, out=str(tmp_path / "plain")))
    z = [RunStore(tmp_path / name).step(2).z for name in ("scaled", "plain")]
    torch.testing.assert_close(*z, rtol=1e-3, atol=1e-3)


class TooLarge(torch.amp.GradScaler):  # pyright: ignore[reportPrivateImportUsage]
    """A scale at which gradients overflow, as 65536 may in float16."""

    def __init__(self, device: str) -> None:
        super().__init__(device, init_scale=2.0**127)


def test_an_inner_step_whose_gradients_overflow_is_made_at_a_smaller_scale(
    image: Path, tmp_path: Path
) -> None:
    for name in ("scaled", "plain"):
        trainer = fits.trainer(precision="bf16-mixed")
        if name == "scaled":
            plugin: Any = trainer.precision_plugin
            plugin.scaler = TooLarge("cpu")
        trainer.fit(
            fits.model(inner_steps=1), datamodule=SourceImages(str(image), SOURCE, out=str(tmp_path / name))
        )
    scaled, plain = (RunStore(tmp_path / name) for name in ("scaled", "plain"))
    assert [info["inner_steps"] for info in fits.infos(scaled)] == [1, 1, 1]
    for name, value in plain.step(0).psi.items():
        torch.testing.assert_close(scaled.step(0).psi[name], value, rtol=1e-2, atol=1e-3)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Everything in float64, psi as it is stored, too."""
    monkeypatch.setitem(DTYPES, "float32", torch.float64)
    monkeypatch.setattr("kvinv_pl.training.trainer.COMPUTE_DTYPES", {"32-true": torch.float64})
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tuned_alone_and_beside(names: str, folder: Path) -> list[tuple[RunStore, RunStore]]:
    """The runs of each picture, with one slot and with two."""
    fits.pictures(folder / "in", names)
    stores: list[list[RunStore]] = []
    for slots in (1, 2):
        data = SourceImages(str(folder / "in"), SOURCE, out=str(folder / str(slots)))
        fits.trainer().fit(fits.model(slots=slots), datamodule=data)
        stores.append([image.store for image in data.images])
    return list(zip(*stores, strict=True))


@pytest.mark.usefixtures("double")
def test_in_float64_psi_of_a_picture_does_not_depend_on_who_shares_its_batch(tmp_path: Path) -> None:
    for alone, beside in tuned_alone_and_beside("abc", tmp_path):
        for i in range(3):
            one, other = alone.step(i), beside.step(i)
            assert {value.dtype for value in one.psi.values()} == {torch.float64}
            for name, value in one.psi.items():
                torch.testing.assert_close(value, other.psi[name], rtol=1e-7, atol=1e-9)


def test_in_fp32_z_tilde_and_the_reconstruction_of_a_picture_hardly_depend_on_it(tmp_path: Path) -> None:
    for alone, beside in tuned_alone_and_beside("ab", tmp_path):
        torch.testing.assert_close(alone.step(2).z, beside.step(2).z, rtol=0, atol=2e-3)
        worth = [store.read_run()["reconstruction"]["psnr_to_round_trip"] for store in (alone, beside)]
        assert abs(worth[0] - worth[1]) <= 0.1
