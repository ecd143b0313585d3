"""The trainer: fit(), invert() and edit(), and run() for all three, over the data's run folders."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from kvinv_pl.data.source_image import SourceImage, Stage
from kvinv_pl.errors import UserError
from kvinv_pl.stages.progress import Observers, Progress
from kvinv_pl.stages.settings import EditSettings, InversionSettings
from kvinv_pl.stages.tuning.certificate import next_attempt
from kvinv_pl.stages.tuning.tune import Tuning
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.devices.launcher import slurm_in_one_line
from kvinv_pl.training.devices.ranks import Ranks
from kvinv_pl.training.devices.strategy import ImageParallelStrategy
from kvinv_pl.training.devices.work_queue import Shares
from kvinv_pl.training.estimate import estimate
from kvinv_pl.training.logs import reporting_write_errors, without_advice
from kvinv_pl.training.machine import Machine
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.options import check_options
from kvinv_pl.training.precision import (
    AUTO,
    COMPUTE_DTYPES,
    check_precision,
    plugin_for,
    precision_for,
    refuse_loss_scaling,
)
from kvinv_pl.training.workload import Workload

log = logging.getLogger(__name__)


class KVTrainer(Trainer):
    """A Trainer whose fit is the curriculum of KV Inversion; the other two stages are methods."""

    fast_dev_run: int | bool  # set by Lightning

    def __init__(
        self,
        accelerator: str = "auto",
        devices: int = 1,
        num_nodes: int = 1,
        strategy: str = "auto",
        precision: str = AUTO,
        logger: Logger | bool = True,
        callbacks: list[Callback] | Callback | None = None,
        fast_dev_run: bool = False,
        max_epochs: int = -1,
        gradient_clip_val: float | None = None,
        accumulate_grad_batches: int = 1,
        deterministic: bool | None = None,
        profiler: str | None = None,
        default_root_dir: str | None = None,
        quiet: bool = False,
        x_0_every: int = 10,
    ):
        """Take those options of Lightning's Trainer that apply here.

        Args:
            accelerator: cpu, gpu, mps or auto.
            devices: Number of devices per machine, -1 for all; each works on its own pictures.
            num_nodes: Number of machines.
            strategy: auto or image_parallel, which are the same: one process per device, nothing is averaged.
            precision: Precision of the U-Net and the text model: 32-true, bf16-mixed or (on a GPU) 16-mixed;
                psi, the loss, DDIM and the VAE stay in fp32. auto: bf16-mixed on an NVIDIA or AMD GPU that
                supports it, unless the model is the embedded one; 32-true otherwise.
            logger: A Lightning logger; true: TensorBoard, in logs under the run folder.
            callbacks: Lightning callbacks.
            fast_dev_run: A dry run: one inner step of one phase of the first picture; nothing is written.
            max_epochs: Not used: an epoch is a phase of the curriculum, which sets their number.
            gradient_clip_val: Not supported: it would couple pictures that are tuned side by side.
            accumulate_grad_batches: Not supported: every inner step sees the whole loss.
            deterministic: As in Lightning's Trainer.
            profiler: As in Lightning's Trainer.
            default_root_dir: As in Lightning's Trainer.
            quiet: Show no progress.
            x_0_every: Decode and log the predicted x_0 every so many timesteps, which costs one VAE decoding
                per picture; 0: never.
        """
        check_options(
            strategy, devices, num_nodes, max_epochs, gradient_clip_val, accumulate_grad_batches, x_0_every
        )
        check_precision(precision, accelerator)
        self._chooses_precision = precision == AUTO  # once the checkpoint is known
        initial_precision: Any = "32-true" if self._chooses_precision else precision
        with without_advice(), slurm_in_one_line():
            super().__init__(
                accelerator=accelerator, devices=devices, precision=initial_precision,
                logger=False if isinstance(logger, bool) else logger,
                callbacks=callbacks, fast_dev_run=fast_dev_run, max_epochs=-1, deterministic=deterministic,
                profiler=profiler, default_root_dir=default_root_dir, enable_checkpointing=False,
                num_nodes=num_nodes, strategy=ImageParallelStrategy(), use_distributed_sampler=False,
                enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
                log_every_n_steps=1,
            )  # fmt: skip
        self._log_to_run = logger is True and not fast_dev_run
        self._logged_in: Path | None = None
        self._quiet = quiet
        self.observers = Observers(Progress(quiet=quiet), x_0_every=x_0_every)

    @property
    def ranks(self) -> Ranks:
        """The ranks and their shares of the pictures."""
        assert isinstance(self.strategy, ImageParallelStrategy)
        return self.strategy.ranks

    def settle_precision(self, model: KVInversion) -> torch.dtype:
        """Choose the precision, where it is auto; the dtype in which the U-Net is held."""
        if self._chooses_precision:
            device = self.strategy.root_device
            self.strategy.precision_plugin = plugin_for(precision_for(model.checkpoint, device), device)
        return COMPUTE_DTYPES[str(self.precision)]

    def invert(self, model: KVInversion, datamodule: SourceImages) -> None:
        """Stage 1: find the trajectory of every picture by DDIM inversion."""
        self._run_workload(model, datamodule, ["invert"])

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Stage 2: learn psi_t of every picture, timestep by timestep; invert first what is not inverted."""
        if not isinstance(model, KVInversion) or not isinstance(datamodule, SourceImages):
            raise UserError("fit expects a KVInversion model and SourceImages as its datamodule")
        if ckpt_path is not None or train_dataloaders is not None:
            raise UserError("a fit resumes from the run folder: leave ckpt_path and dataloaders out")
        self._run_workload(model, datamodule, ["invert", "fit"])

    def edit(
        self, model: KVInversion, datamodule: SourceImages, settings: EditSettings | None = None
    ) -> None:
        """Stage 3: render every tuned picture as its targets say.

        Args:
            model: The module.
            datamodule: The pictures.
            settings: The settings of the edits; None: the model's.
        """
        self._run_workload(model, datamodule, ["edit"], settings)

    def run(self, model: KVInversion, datamodule: SourceImages) -> None:
        """All three stages: invert, tune and edit, each as far as it is not yet done."""
        self._run_workload(model, datamodule, ["invert", "fit", "edit"])

    def plan(self, model: KVInversion, datamodule: SourceImages) -> None:
        """Estimate what all stages need: slots, memory, disk, forward passes and time; nothing is tuned."""
        device = self.strategy.root_device
        chosen = precision_for(model.checkpoint, device) if self._chooses_precision else str(self.precision)
        machine = Machine.measure(device, COMPUTE_DTYPES[chosen], self.ranks.world.local_size)
        for line in estimate(model, datamodule, machine) if self.ranks.is_main else ():
            print(line)

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Do nothing: the state is in the run folder, and the same command resumes from there.

        Lightning calls it when SLURM requeues a job, which would then start from such a checkpoint.
        """

    # ---- from all pictures to shares of them

    def _run_workload(
        self,
        model: KVInversion,
        data: SourceImages,
        stages: Sequence[Stage],
        editing: EditSettings | None = None,
    ) -> None:
        """Check everything first; then take share after share through the stages."""
        if not self.ranks.is_called():  # a rank skips the calls it was not started for
            return
        self.observers.progress.quiet = self._quiet or not self.ranks.is_main
        workload = Workload(model, data, stages, bool(self.fast_dev_run), editing)
        failures = self.observers.failures = workload.failures
        self.settle_precision(model)
        if "fit" in stages and getattr(self.precision_plugin, "scaler", None) is not None:
            refuse_loss_scaling(model.optimizer)
        with without_advice(), self.ranks.running():
            shares = self._make_shares(workload)
            # all ranks find these failures
            known_failures = {} if self.ranks.is_main else dict(failures.reasons)
            with reporting_write_errors(data.out) as log_errors:
                for n in self.ranks.claim_shares(len(shares)):
                    slots, members = shares[n]
                    images = [data.images[member] for member in members]
                    with workload.locked(images):
                        self._run_share(workload, slots, images)
            self.ranks.report(failures.reasons)
        if log_errors:
            Progress().note(f"some logs were lost: {log_errors[0].strerror or log_errors[0]}")
        failures.reasons |= self.ranks.reported
        for line in workload.results(with_quality=self.ranks.world.size > 1):  # others' lines are not shown
            self.observers.progress.note(line)
        if self.ranks.was_started:
            raise SystemExit(0)  # the starter shows what failed, and continues the program
        if self.ranks.is_one_of_many and len(failures.reasons) < failures.total:
            for label in failures.reasons.keys() - known_failures.keys():
                Progress(quiet=self._quiet).note(f"{label}: {failures.reasons[label]}")
            return  # an exit code would end the other ranks
        failures.raise_failures()

    def _make_shares(self, workload: Workload) -> Shares:
        """Load the model; return the shares, which the main rank computes for the ranks it started."""
        model, ranks, dtype = workload.model, self.ranks, COMPUTE_DTYPES[str(self.precision)]
        if ranks.was_started:
            try:
                model.load_backbone(dtype)
            except Exception:  # if the starter fails likewise, it shows the error
                ranks.wait_for_shares()
                raise
            return ranks.wait_for_shares()
        model.load_backbone(dtype)
        # independent ranks must compute the same shares, so free memory must not matter to them
        shares = workload.shares(
            None if ranks.is_one_of_many else ranks.world.local_size, ranks.device, self.observers.progress
        )
        ranks.publish_shares(shares)
        for line in workload.notes() if ranks.is_main else ():
            log.warning("%s", line)  # quiet or not
        for line in workload.choices(str(self.precision) if self._chooses_precision else None):
            self.observers.progress.note(line)
        return shares

    # ---- the stages of pictures side by side

    def _run_share(self, workload: Workload, slots: int, images: list[SourceImage]) -> None:
        """Take the pictures of a share through the stages, skipping what is done."""
        failures = workload.failures
        if "invert" in workload.stages:
            self._predict(workload, images, workload.model.inverting)
            for image in failures.remaining(images):
                with failures.catching([image]):
                    image.remember_targets()
        if "fit" in workload.stages:
            with failures.catching(images):
                self._fit(workload, slots, images)
        if "edit" in workload.stages and not self.fast_dev_run:
            self._predict(workload, images, workload.editing)

    def _predict(
        self, workload: Workload, images: list[SourceImage], settings: InversionSettings | EditSettings
    ) -> None:
        """Stage 1 or 3 of the pictures that are left, one after the other."""
        if left := workload.failures.remaining(images):
            jobs = workload.data.jobs(left, settings, self.observers)
            self.predict(workload.model, jobs, return_predictions=False)

    def _fit(self, workload: Workload, slots: int, images: list[SourceImage]) -> None:
        """Tune pictures side by side; retry those that do not pass."""
        model, failures, attempt = workload.model, workload.failures, 0
        self._set_loggers(workload.data)
        fit: Tuning | None = None
        while attempt is not None:
            for which in model.passes(images, slots, self.observers):
                fit = model.prepare(images, slots, self.observers, attempt, which)
                self._tune(fit, workload)
                if which == "pivots" and fit.plan:
                    self.observers.progress.finish()
                if self.fast_dev_run:
                    return
            assert fit is not None
            fit.results.certify_rest(fit.images)
            if not model.denoiser.learns:
                return  # a retry would give the same
            due = [next_attempt(image.store, model.tuning) for image in failures.remaining(images)]
            attempt = min((number for number in due if number is not None), default=None)

    def _set_loggers(self, data: SourceImages) -> None:
        """Set the loggers of a fit: those given, or TensorBoard under the run folder."""
        if self._log_to_run and (not self.loggers or self._logged_in not in (None, data.out)):
            world = self.ranks.world  # a folder of logs for each, where there are several
            version = f"rank{world.rank}" if world.size > 1 else ""
            self.loggers = [TensorBoardLogger(data.out, name="logs", version=version)]
            self._logged_in = data.out
        self.observers.loggers = self.loggers

    def _tune(self, fit: Tuning, workload: Workload) -> None:
        """Lightning's fit, whose epochs are the phases of the plan."""
        data = workload.data
        data.inner_steps = fit.inner_steps
        if fit.plan:
            self.fit_loop.epoch_progress.reset()
            with self.ranks.between_steps(), fit.results.writer.running():
                super().fit(workload.model, datamodule=data)
