"""The trainer around the stages: what it goes on with, what it refuses, what it says and what it leaves."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from fits import SOURCE, TARGET, tensors
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from kvinv_pl.data.runs.lock import InUseError
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.stages.progress import Progress
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.trainer import KVTrainer
from kvinv_pl.training.workload import Workload


def data(image: Path, out: Path, **options: Any) -> SourceImages:
    return SourceImages(
        **{"image": str(image), "source": SOURCE, "targets": [TARGET], "out": str(out), **options}
    )


class Killed(Exception):
    """The end of the process, as far as a test can have it."""


class Kill(Callback):
    def __init__(self, epoch: int, batch: int | None = None) -> None:
        self.at = (epoch, batch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch, None) == self.at:
            raise Killed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            raise Killed


# ----------------------------------------------------------------------------------- going on after a kill


@pytest.fixture(scope="module", params=[True, False], ids=["carry", "no_carry"])
def uninterrupted(
    request: pytest.FixtureRequest, image: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], RunStore]:
    settings = {"carry": request.param, "store_dtype": "float16"}
    return settings, fits.fit(image, tmp_path_factory.mktemp("run"), **settings)


@pytest.mark.parametrize(("epoch", "batch", "done"), [(1, None, 1), (2, None, 2), (1, 1, 1)])
def test_a_fit_that_was_killed_goes_on_to_the_same_files_bit_for_bit(
    epoch: int, batch: int | None, done: int, uninterrupted: Any, image: Path, tmp_path: Path
) -> None:
    settings, whole = uninterrupted
    with pytest.raises(Killed):
        fits.trainer(callbacks=[Kill(epoch, batch)]).fit(
            fits.model(**settings), datamodule=data(image, tmp_path / "run")
        )
    assert RunStore(tmp_path / "run").done() == {*range(done)}
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run" / "steps").iterdir()}
    store = fits.fit(image, tmp_path / "run", **settings)
    assert tensors(store) == tensors(whole) and len(tensors(store)) == 4
    assert store.read_run()["reconstruction"] == whole.read_run()["reconstruction"]
    assert {name: (store.folder / "steps" / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.parametrize("survivors", [0, 2])
def test_a_kill_while_a_phase_is_written_costs_that_phase(
    survivors: int, uninterrupted: Any, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, whole = uninterrupted
    save_step = RunStore.save_step

    def save(self: RunStore, i: int, *rest: Any) -> None:
        if i == survivors:
            raise Killed
        save_step(self, i, *rest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunStore, "save_step", save)
        fits.fit(image, tmp_path / "run", **settings)
    assert tensors(fits.fit(image, tmp_path / "run", **settings)) == tensors(whole)


def test_a_kill_after_the_last_phase_costs_nothing_but_the_reconstruction_which_is_made_up_for(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_picture = RunStore.save_picture

    def save(self: RunStore, name: str, picture: Any) -> Path:
        if name == "reconstruction":
            raise Killed
        return save_picture(self, name, picture)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunStore, "save_picture", save)
        fits.fit(image, tmp_path / "run")
    store = RunStore(tmp_path / "run")
    steps = tensors(store)
    assert store.done() == {0, 1, 2} and "reconstruction" not in store.read_run()
    fits.trainer().run(fits.model(), data(image, tmp_path / "run"))
    assert tensors(store) == steps
    assert store.read_run()["reconstruction"]["psnr_to_round_trip"] > 0
    assert (store.folder / "sheet.png").exists()


def test_a_kill_while_inverting_leaves_nothing_that_looks_done(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*rest: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunStore, "write_run", die)
        fits.trainer().invert(fits.model(), data(image, tmp_path / "run"))
    assert not RunStore(tmp_path / "run").has_run()
    assert fits.fit(image, tmp_path / "run").done() == {0, 1, 2}


def test_of_pictures_side_by_side_each_goes_on_where_it_was(tmp_path: Path) -> None:
    fits.pictures(tmp_path / "pictures", "abc")
    whole = data(tmp_path / "pictures", tmp_path / "whole")
    fits.trainer().fit(fits.model(slots=2), datamodule=whole)
    again = data(tmp_path / "pictures", tmp_path / "again")
    fits.trainer().fit(fits.model(slots=2), datamodule=again)
    for image, step in zip(again.images, (1, 2, 0), strict=True):
        (image.store.folder / "steps" / f"{step}.safetensors").unlink()
    fits.trainer().fit(fits.model(slots=2), datamodule=data(tmp_path / "pictures", tmp_path / "again"))
    for one, two in zip(whole.images, again.images, strict=True):
        assert two.store.done() == {0, 1, 2}
        torch.testing.assert_close(one.store.step(2).z, two.store.step(2).z, rtol=0, atol=2e-3)


def test_a_finished_fit_is_not_done_again(image: Path, tmp_path: Path) -> None:
    store = fits.finished(tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in store.folder.rglob("*.*g")} | {
        file: file.stat().st_mtime_ns for file in store.folder.rglob("*.safetensors")
    }
    fits.fit(image, tmp_path / "run")
    assert {file: file.stat().st_mtime_ns for file in before} == before and len(before) == 6


def test_one_trainer_and_one_module_serve_stage_after_stage(image: Path, tmp_path: Path) -> None:
    trainer, module = fits.trainer(), fits.model()
    for out in ("one", "two"):
        trainer.invert(module, data(image, tmp_path / out))
        trainer.fit(module, datamodule=data(image, tmp_path / out))
        trainer.edit(module, data(image, tmp_path / out))
    assert tensors(RunStore(tmp_path / "one")) == tensors(RunStore(tmp_path / "two"))


# ----------------------------------------------------------------------------------------- precision


class Dtypes(Callback):
    """What psi and the U-Net are held in while they are tuned."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, KVInversion)
        denoiser = pl_module.denoiser
        self.psi = {value.dtype for value in denoiser.psi.parameters()}
        self.gradients = {value.grad.dtype for value in denoiser.psi.parameters() if value.grad is not None}
        self.unet = {value.dtype for value in denoiser.backbone.unet.parameters()}
        self.vae = {value.dtype for value in denoiser.backbone.vae.parameters()}


def test_bf16_mixed_holds_the_unet_in_bf16_and_psi_and_the_vae_in_fp32(image: Path, tmp_path: Path) -> None:
    dtypes, module = Dtypes(), fits.model()
    trainer = fits.trainer(precision="bf16-mixed", callbacks=[dtypes])
    trainer.run(module, data(image, tmp_path / "run"))
    assert dtypes.unet == {torch.bfloat16}
    assert dtypes.psi == dtypes.gradients == dtypes.vae == {torch.float32}
    store = RunStore(tmp_path / "run")
    infos = [store.step_info(i) for i in range(2)]
    assert all(info["loss_end"] < info["loss_start"] for info in infos)
    assert store.trajectory().dtype == store.step(0).z.dtype == torch.float32
    assert len(module.last_edits) == 1


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "transformer-engine", "32"])
def test_precisions_in_which_psi_would_not_be_fp32_are_refused(precision: str) -> None:
    with pytest.raises(UserError, match=f"got {precision}: psi is tuned in fp32"):
        fits.trainer(precision=precision)


def test_16_mixed_on_a_cpu_is_refused_by_name_and_not_replaced() -> None:
    with pytest.raises(UserError, match="16-mixed needs a GPU: use bf16-mixed"):
        fits.trainer(precision="16-mixed")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_epochs": 10}, "an epoch is one timestep"),
        ({"gradient_clip_val": 1.0}, "would couple the pictures"),
        ({"accumulate_grad_batches": 2}, "would couple the pictures"),
        ({"strategy": "ddp"}, "would average the psi of different pictures"),
    ],
)
def test_trainer_options_that_would_break_the_curriculum_are_refused_with_the_reason(
    options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        fits.trainer(**options)


# --------------------------------------------------------------------------------------- fast_dev_run


class Count(Callback):
    def __init__(self) -> None:
        self.epochs = self.batches = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1


def test_fast_dev_run_makes_one_inner_step_of_one_phase_and_keeps_nothing_of_it(
    image: Path, tmp_path: Path
) -> None:
    count = Count()
    trainer = fits.trainer(fast_dev_run=True, callbacks=[count], logger=True)
    trainer.run(fits.model(), data(image, tmp_path / "run"))
    store = RunStore(tmp_path / "run")
    assert (count.epochs, count.batches) == (1, 1)
    assert store.done() == set() and store.edits() == []
    assert not (store.folder / "logs").exists()
    assert fits.fit(image, tmp_path / "run", inner_steps=2).done() == {0, 1, 2}  # with other settings, too


# ------------------------------------------------------------------------------------ callbacks and logs


def test_every_phase_is_an_epoch_and_every_inner_step_a_batch(image: Path, tmp_path: Path) -> None:
    count = Count()
    fits.trainer(callbacks=[count]).fit(fits.model(), datamodule=data(image, tmp_path / "run"))
    assert (count.epochs, count.batches) == (3, 9)


def test_the_log_has_every_phase_at_its_step_index(image: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of tensorboard's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fits.trainer(logger=True).fit(fits.model(), datamodule=data(image, tmp_path / "run"))
    store = RunStore(tmp_path / "run")
    log = EventAccumulator(str(store.folder / "logs"))
    log.Reload()
    for key in ("loss_start", "loss_end", "inner_steps"):
        events = log.Scalars(f"run/{key}")
        assert [event.step for event in events] == [0, 1, 2]
        assert [event.value for event in events] == pytest.approx([store.step_info(i)[key] for i in range(3)])


def test_one_trainer_logs_each_fit_in_its_own_run_folder(image: Path, tmp_path: Path) -> None:
    trainer, model = fits.trainer(logger=True), fits.model(steps=1, inner_steps=1)
    for name in ("first", "second"):
        trainer.fit(model, datamodule=data(image, tmp_path / name))
        assert any((tmp_path / name / "logs").iterdir())


def test_a_logger_of_the_users_own_is_used_instead(image: Path, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "mine")
    fits.trainer(logger=logger).fit(fits.model(), datamodule=data(image, tmp_path / "run"))
    logger.save()
    assert "run/loss_end" in next((tmp_path / "mine").rglob("metrics.csv")).read_text()
    assert not (tmp_path / "run" / "logs").exists()


def test_a_run_leaves_what_a_run_folder_is_to_hold_and_nothing_else(image: Path, tmp_path: Path) -> None:
    fits.trainer(logger=True).run(fits.model(), data(image, tmp_path / "run"))
    found = {
        str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()
    }
    logs = {path for path in found if path.startswith("logs")}
    expected = {"run.json", "source.png", "reconstruction.png", "sheet.png", "trajectory.safetensors"}
    expected |= {f"steps/{i}.safetensors" for i in range(3)} | {
        f"edits/a-cat-running.{kind}" for kind in ("png", "json")
    }
    assert logs and found - logs - {".lock"} == expected


# --------------------------------------------------------------------------------------------- noise


@pytest.fixture
def lightning_log() -> Iterator[list[str]]:
    """Everything that Lightning's loggers let through."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield said
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_progress_and_the_place_to_look_are_all_that_is_said(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lightning_log: list[str]
) -> None:
    fits.trainer(quiet=False).run(fits.model(required_psnr=1.0), data(image, tmp_path / "run"))
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == "" and lightning_log == []
    assert lines.pop(0).startswith("--steps 3 begins at timestep 667 of 999, and the noisiest 33% of")
    assert lines.pop(0) == "chosen by checkpoint and device: precision 32-true"
    assert [line.partition(":")[0] for line in lines[:3]] == [
        "inverting cat.png", "tuning cat.png", "editing cat.png",
    ]  # fmt: skip
    assert "dB to the VAE round trip" in lines[1]
    assert lines[3:] == [f"look at {tmp_path / 'run' / 'sheet.png'}"]


def test_lightnings_own_voice_comes_back_afterwards(
    image: Path, tmp_path: Path, lightning_log: list[str]
) -> None:
    fits.fit(image, tmp_path / "run")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").info("hello")
    assert lightning_log == ["hello"]


def test_warnings_that_are_not_lightnings_advice_are_let_through(image: Path, tmp_path: Path) -> None:
    class Warn(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            warnings.warn("something to know", FutureWarning, stacklevel=1)

    trainer = fits.trainer(callbacks=[Warn()])
    with pytest.warns(FutureWarning, match="something to know"):
        trainer.fit(fits.model(), datamodule=data(image, tmp_path / "run"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no signals to a process")
def test_a_process_that_is_asked_to_end_does_not_wait_for_the_end_of_sampling(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made = fits.finished(tmp_path / "run"), list[str]()

    def advance(self: Progress, detail: str, steps: int = 1) -> None:
        made.append(detail)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
            patched.setattr(Progress, "advance", advance)
            fits.trainer().edit(fits.model(), data(image, tmp_path / "run"))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 143 and len(made) == 1 and not store.edits()
    with store.lock():  # which is free
        pass


def test_slurms_requeueing_leaves_no_checkpoint_that_a_fit_would_go_on_from(tmp_path: Path) -> None:
    trainer = fits.trainer(default_root_dir=str(tmp_path))
    trainer.save_checkpoint(trainer._checkpoint_connector.hpc_save_path(str(tmp_path)))
    assert not [*tmp_path.iterdir()]


# ------------------------------------------------------------------------------------- what is refused


def test_fit_goes_on_from_the_run_folder_and_from_nothing_else(image: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave ckpt_path and dataloaders out"):
        fits.trainer().fit(fits.model(), datamodule=data(image, tmp_path / "run"), ckpt_path="last")
    with pytest.raises(UserError, match="fit expects a KVInversion model and SourceImages"):
        fits.trainer().fit(fits.model())


def test_an_edit_without_a_target_is_refused_before_anything_is_done(image: Path, tmp_path: Path) -> None:
    for verb in (KVTrainer.run, KVTrainer.edit):
        with pytest.raises(UserError, match=r"no target for cat\.png"):
            verb(fits.trainer(), fits.model(), data(image, tmp_path / "run", targets=[]))
    assert not (tmp_path / "run").exists()


def test_another_picture_in_the_same_folder_is_refused_unless_it_is_to_be_overwritten(tmp_path: Path) -> None:
    first = fits.finished(tmp_path / "run")
    steps = tensors(first)
    other = fits.picture(tmp_path / "dog.png", seed=9)
    with pytest.raises(UserError, match=r"made with another image \(name = 'cat.png', not 'dog.png'\)"):
        fits.fit(other, tmp_path / "run")
    assert tensors(first) == steps
    fits.trainer().fit(fits.model(), datamodule=data(other, tmp_path / "run", overwrite=True))
    assert first.read_run()["picture"]["name"] == "dog.png" and tensors(first).keys() == steps.keys()
    assert not set(tensors(first).values()) & set(steps.values())


def test_ranks_find_the_same_shares_while_another_of_them_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, module = fits.finished(tmp_path / "run"), fits.model()
    other = data(fits.picture(tmp_path / "dog.png", seed=9), tmp_path / "run", overwrite=True)
    module.load_backbone(torch.float32)
    read = RunStore.read_run

    def cleared(self: RunStore) -> dict[str, Any]:
        store.clear()  # by the rank that has this picture, between another's look for a run and its reading
        return read(self)

    monkeypatch.setattr(RunStore, "read_run", cleared)
    workload = Workload(module, other, ["invert", "fit"], dry_run=False)
    assert workload.shares(None, torch.device("cpu"), Progress(quiet=True)) == [(1, [0])]
    assert not workload.failures.reasons


def test_a_run_in_use_is_not_touched_even_to_overwrite_it(tmp_path: Path) -> None:
    store = fits.finished(tmp_path / "run")
    steps = tensors(store)
    other = fits.picture(tmp_path / "dog.png", seed=9)
    with store.lock(), pytest.raises(InUseError, match="in use by process"):
        fits.trainer().fit(fits.model(), datamodule=data(other, tmp_path / "run", overwrite=True))
    assert tensors(store) == steps


def test_overwriting_with_a_picture_that_cannot_be_read_loses_nothing(tmp_path: Path) -> None:
    store = fits.finished(tmp_path / "run")
    steps = tensors(store)
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(UserError):
        fits.trainer().fit(
            fits.model(), datamodule=data(tmp_path / "bad.png", tmp_path / "run", overwrite=True)
        )
    assert tensors(store) == steps


def test_a_variant_that_returns_another_shape_is_named_and_the_run_goes_on_with_a_right_one(
    image: Path, tmp_path: Path
) -> None:
    class Wrong(FullKV):
        def forward(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return k[..., :1], v

    with pytest.raises(UserError, match=r"Wrong\.forward returned the shape"):
        fits.fit(image, tmp_path / "run", attention=Wrong)
    assert fits.fit(image, tmp_path / "run").done() == {0, 1, 2}
