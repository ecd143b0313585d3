"""The trainer: invert() and edit() beside fit(), and run() for all three, over the data's run folders."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from kvinv_pl.data import SourceImages
from kvinv_pl.errors import UserError
from kvinv_pl.module import KVInversion
from kvinv_pl.progress import Progress
from kvinv_pl.work import Stage, Work

CHATTY = (
    "lightning.pytorch",
    "lightning.fabric",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
)
ADVICE = (
    r"The '\w+' does not have many workers",  # there is nothing to load
    "predict returned None",  # its results are in the run folder
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # of Lightning's own
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the frozen model
    r"`LightningModule.configure_optimizers` returned `None`",  # a variant may learn nothing
    r"You have overridden `transfer_batch_to_device`",  # on purpose
    r"\w+ available but not used",  # a CPU may be asked for
)
COMPUTE_DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class KVTrainer(Trainer):
    """A Trainer whose fit is the curriculum of KV Inversion and which has its other two stages as methods."""

    fast_dev_run: int | bool  # set by Lightning

    def __init__(
        self,
        accelerator: str = "auto",
        devices: int = 1,
        precision: str = "32-true",
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
    ):
        """Take Lightning's own options, as far as they have a meaning here.

        Args:
            accelerator: cpu, gpu, mps or auto.
            devices: How many; tuning runs on one.
            precision: 32-true, bf16-mixed or (on a GPU) 16-mixed; psi, loss, DDIM and the VAE stay in fp32.
            logger: True: TensorBoard under the run folder's logs.
            callbacks: Any Lightning callbacks.
            fast_dev_run: One inner step of one phase of the first picture, of which nothing is kept.
            max_epochs: Leave it: an epoch is a phase of the curriculum, which counts them itself.
            gradient_clip_val: Leave it: it would couple pictures that are tuned side by side.
            accumulate_grad_batches: Leave it: every inner step sees the whole loss.
            deterministic: As Lightning has it.
            profiler: As Lightning has it.
            default_root_dir: As Lightning has it.
            quiet: No progress.
        """
        if max_epochs != -1:
            raise UserError(
                f"max_epochs: got {max_epochs}, but an epoch is one timestep, and model.steps says how many "
                "there are; leave it at -1"
            )
        if gradient_clip_val is not None or accumulate_grad_batches != 1:
            raise UserError(
                "gradient_clip_val and accumulate_grad_batches would couple the pictures of a batch: "
                "leave them out"
            )
        if devices != 1:
            raise UserError(
                f"devices: expected 1, got {devices}: plain data parallelism would average the psi of "
                "different pictures"
            )
        if precision not in COMPUTE_DTYPES:
            raise UserError(
                f"precision: expected {', '.join(COMPUTE_DTYPES)}, got {precision}: psi is tuned in fp32"
            )
        if precision == "16-mixed" and (accelerator == "cpu" or not torch.cuda.is_available()):
            raise UserError("precision 16-mixed needs a GPU: use bf16-mixed or 32-true on a CPU")
        with _without_advice():
            super().__init__(
                accelerator=accelerator, devices=devices, precision=precision,  # pyright: ignore[reportArgumentType]
                logger=False if isinstance(logger, bool) else logger,
                callbacks=callbacks, fast_dev_run=fast_dev_run, max_epochs=-1, deterministic=deterministic,
                profiler=profiler, default_root_dir=default_root_dir, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
                log_every_n_steps=1,
            )  # fmt: skip
        self._log_to_run = logger is True and not fast_dev_run
        self.watch = Progress(quiet=quiet)

    def invert(self, model: KVInversion, datamodule: SourceImages) -> None:
        """Stage 1: find the trajectory of every picture by DDIM inversion."""
        with self._working(model, datamodule, "invert"):
            self._invert(model, datamodule)
        self._say_where(datamodule)

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
            raise UserError("the run folder is what a fit goes on from: leave ckpt_path and dataloaders out")
        with self._working(model, datamodule, "fit"):
            self._invert(model, datamodule)
            self._fit(model, datamodule)
        self._say_where(datamodule)

    def edit(self, model: KVInversion, datamodule: SourceImages) -> None:
        """Stage 3: render every tuned picture as its targets say."""
        self._require_targets(datamodule)
        with self._working(model, datamodule, "edit"):
            self._edit(model, datamodule)
        self._say_where(datamodule)

    def run(self, model: KVInversion, datamodule: SourceImages) -> None:
        """All three stages: invert, tune and edit, each as far as it is not yet done."""
        self._require_targets(datamodule)
        with self._working(model, datamodule, "fit"):
            self._invert(model, datamodule)
            self._fit(model, datamodule)
            if not self.fast_dev_run:
                self._edit(model, datamodule)
        self._say_where(datamodule)

    # ---- the stages

    def _invert(self, model: KVInversion, data: SourceImages) -> None:
        if any(not model.is_inverted(work) for work in data.works):
            self.predict(model, data.jobs("invert"), return_predictions=False)

    def _fit(self, model: KVInversion, data: SourceImages) -> None:
        groups: dict[tuple[int, ...], list[Work]] = {}
        for work in data.works[:1] if self.fast_dev_run else data.works:
            groups.setdefault(tuple(work.store.read_run()["picture"]["model_size"]), []).append(work)
        data.inner_steps = model.inner_steps
        for works in groups.values():
            if model.prepare(works):
                self.fit_loop.epoch_progress.reset()
                super().fit(model, datamodule=data)
            if not self.fast_dev_run:
                model.certify_rest(works)

    def _edit(self, model: KVInversion, data: SourceImages) -> None:
        self.predict(model, data.jobs("edit"), return_predictions=False)

    # ---- what is around them

    @contextmanager
    def _working(self, model: KVInversion, data: SourceImages, stage: Stage) -> Iterator[None]:
        """Everything that can be wrong is found first; then the run folders are held, and left in order."""
        model.watch = self.watch
        model.load_backbone(COMPUTE_DTYPES[str(self.precision)])
        fresh = [work.store.folder for work in data.works if not work.store.folder.exists()]
        stale = [work for work in data.works if not self._fits(model, work, stage, data.overwrite)]
        try:
            with ExitStack() as held:
                held.enter_context(_without_advice())
                for work in data.works:
                    held.enter_context(work.store.lock())
                for work in stale:
                    work.store.clear()
                if self._log_to_run and not self.loggers:
                    self.loggers = [TensorBoardLogger(data.out, name="logs", version="")]
                yield
        except OSError as error:  # what Lightning and TensorBoard write beside our own files
            raise UserError(
                f"cannot write {error.filename or data.out}: {error.strerror or error}; "
                "make room and give the same command again"
            ) from error
        finally:
            for folder in fresh:  # where nothing came of it, nothing is left
                if folder.is_dir() and os.listdir(folder) == [".lock"]:
                    (folder / ".lock").unlink()
                    folder.rmdir()

    @staticmethod
    def _fits(model: KVInversion, work: Work, stage: Stage, overwrite: bool) -> bool:
        """Open the picture, and see that what lies in its run folder belongs to it, or may be overwritten."""
        try:
            model.check(work, stage)
        except UserError:
            if not (overwrite and work.image is not None and work.store.has_run()):
                raise
            model.check(work, stage, anew=True)
            return False
        return True

    @staticmethod
    def _require_targets(data: SourceImages) -> None:
        for work in data.works:
            if not work.targets:
                raise UserError(
                    f"no target for {work.name}: say with --target what it should become (repeatable)"
                )

    def _say_where(self, data: SourceImages) -> None:
        for work in data.works:
            found = [
                file
                for name in ("sheet.png", "reconstruction.png", "run.json")
                if (file := work.store.folder / name).exists()
            ]
            self.watch.note(f"look at {found[0] if found else work.store.folder}")


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep back what Lightning tells those who train networks; any other warning is let through."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in ADVICE:
            warnings.filterwarnings("ignore", message=message)
        try:
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
