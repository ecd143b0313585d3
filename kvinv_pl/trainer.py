"""The trainer: invert() and edit() beside fit(), and run() for all three, over the data's run folders."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from kvinv_pl.advice import without_advice
from kvinv_pl.certificate import next_attempt
from kvinv_pl.data import SourceImages
from kvinv_pl.errors import NoRoomError, UserError
from kvinv_pl.failures import Failures
from kvinv_pl.module import KVInversion
from kvinv_pl.progress import Progress
from kvinv_pl.strategies import ImageParallelStrategy, Shares
from kvinv_pl.work import Stage, Work

COMPUTE_DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class KVTrainer(Trainer):
    """A Trainer whose fit is the curriculum of KV Inversion and which has its other two stages as methods."""

    fast_dev_run: int | bool  # set by Lightning

    def __init__(
        self,
        accelerator: str = "auto",
        devices: int = 1,
        num_nodes: int = 1,
        strategy: str = "auto",
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
        x_0_every: int = 10,
    ):
        """Take Lightning's own options, as far as they have a meaning here.

        Args:
            accelerator: cpu, gpu, mps or auto.
            devices: How many of this machine, -1 for all; each picture is tuned on one of them.
            num_nodes: How many machines, each with as many devices.
            strategy: auto, which is image_parallel: every picture on one device, and nothing is averaged.
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
            x_0_every: Every so many timesteps the predicted x_0 is decoded and logged, at the price of one
                decoding for each picture; 0: never.
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
        if strategy not in ("auto", ImageParallelStrategy.strategy_name):
            raise UserError(
                f"strategy: expected auto or image_parallel, got {strategy}: data parallelism would average "
                "the psi of different pictures, and psi is of one picture alone"
            )
        if (devices < 1 and devices != -1) or num_nodes < 1:
            raise UserError(f"devices and num_nodes: expected 1 or more, got {devices} and {num_nodes}")
        if x_0_every < 0:
            raise UserError(f"x_0_every: expected 0 or more, got {x_0_every}")
        if precision not in COMPUTE_DTYPES:
            raise UserError(
                f"precision: expected {', '.join(COMPUTE_DTYPES)}, got {precision}: psi is tuned in fp32"
            )
        if precision == "16-mixed" and (accelerator == "cpu" or not torch.cuda.is_available()):
            raise UserError("precision 16-mixed needs a GPU: use bf16-mixed or 32-true on a CPU")
        with without_advice():
            super().__init__(
                accelerator=accelerator, devices=devices, precision=precision,  # pyright: ignore[reportArgumentType]
                logger=False if isinstance(logger, bool) else logger,
                callbacks=callbacks, fast_dev_run=fast_dev_run, max_epochs=-1, deterministic=deterministic,
                profiler=profiler, default_root_dir=default_root_dir, enable_checkpointing=False,
                num_nodes=num_nodes, strategy=ImageParallelStrategy(), use_distributed_sampler=False,
                enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
                log_every_n_steps=1,
            )  # fmt: skip
        self._log_to_run = logger is True and not fast_dev_run
        self._x_0_every, self._quiet = x_0_every, quiet
        self.watch = Progress(quiet=quiet or not self.ranks.is_global_zero)

    @property
    def ranks(self) -> ImageParallelStrategy:
        """Who works on which pictures."""
        assert isinstance(self.strategy, ImageParallelStrategy)
        return self.strategy

    def invert(self, model: KVInversion, datamodule: SourceImages) -> None:
        """Stage 1: find the trajectory of every picture by DDIM inversion."""
        self._work(model, datamodule, ["invert"])

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
        self._work(model, datamodule, ["invert", "fit"])

    def edit(self, model: KVInversion, datamodule: SourceImages) -> None:
        """Stage 3: render every tuned picture as its targets say."""
        self._work(model, datamodule, ["edit"])

    def run(self, model: KVInversion, datamodule: SourceImages) -> None:
        """All three stages: invert, tune and edit, each as far as it is not yet done."""
        self._work(model, datamodule, ["invert", "fit", "edit"])

    # ---- from the pictures to those that are worked on side by side

    def _work(self, model: KVInversion, data: SourceImages, stages: Sequence[Stage]) -> None:
        """Everything that can be wrong is found first; then share after share goes through its stages."""
        model.watch, model.x_0_every = self.watch, self._x_0_every
        failures = model.failures = Failures(len(data.works) + len(data.failed))
        failures.reasons |= data.failed
        if "edit" in stages:
            self._require_targets(data, failures)
        if "fit" in stages and getattr(self.precision_plugin, "scaler", None) is not None:
            model.refuse_loss_scaling()
        model.load_backbone(COMPUTE_DTYPES[str(self.precision)])
        with without_advice(), self._writing(data):
            shares = self.ranks.given_shares()
            shares = self._shares(model, data, stages, failures) if shares is None else shares
            known = {} if self.ranks.is_global_zero else dict(failures.reasons)  # by all ranks alike
            with self.ranks.ranks(shares):
                for n in self.ranks.mine(len(shares)):
                    model.side_by_side, members = shares[n]
                    works = [data.works[member] for member in members]
                    with self._held(model, works, data, stages, failures):
                        self._through(model, works, data, stages, failures)
                self.ranks.report(failures.reasons)
        failures.reasons |= self.ranks.reported
        self._say_where(failures.left(data.works))
        if self.ranks.was_started:
            return  # who started this rank says what failed
        if self.ranks.is_one_of_many and len(failures.reasons) < failures.total:
            for label in failures.reasons.keys() - known.keys():
                Progress(quiet=self._quiet).note(f"{label}: {failures.reasons[label]}")
            return  # an exit code would end the other ranks
        failures.report()

    def _shares(
        self, model: KVInversion, data: SourceImages, stages: Sequence[Stage], failures: Failures
    ) -> Shares:
        """Pictures that are worked on side by side, and their slots; what cannot be worked on is given up."""
        alike: dict[tuple[int, int, bool], list[int]] = {}
        for n, work in enumerate(data.works[:1] if self.fast_dev_run else data.works):
            if work not in failures:
                with failures.of([work]):
                    alike.setdefault(self._check(model, work, stages, data.overwrite), []).append(n)
        if len(failures.reasons) == failures.total:
            failures.report()
        shares = []
        for (height, width, _), members in alike.items():
            slots = each = 1
            if "fit" in stages:
                model.to(self.ranks.root_device)
                # free memory differs, and ranks that cannot ask one another must come to the same shares
                alone = self.ranks.is_one_of_many
                # no device is to wait while another has all the pictures
                of_a_device = 1 if alone else -(-len(members) // len(self.ranks.parallel_devices))
                slots = model.choose_slots((height, width), of_a_device)
                each = 1 if alone and model.slots == "auto" else slots
            shares += [(slots, members[begin : begin + each]) for begin in range(0, len(members), each)]
        return shares

    @staticmethod
    def _check(
        model: KVInversion, work: Work, stages: Sequence[Stage], overwrite: bool
    ) -> tuple[int, int, bool]:
        """Open the picture, and see that what lies in its run folder belongs to it, or may be overwritten."""
        stage: Stage = "fit" if "fit" in stages else stages[-1]
        try:
            return model.check(work, stage)
        except UserError:
            if not (overwrite and work.image is not None and work.store.has_run()):
                raise
            return model.check(work, stage, anew=True)

    @contextmanager
    def _held(
        self,
        model: KVInversion,
        works: list[Work],
        data: SourceImages,
        stages: Sequence[Stage],
        failures: Failures,
    ) -> Iterator[None]:
        """Hold the run folders, and leave none where nothing came of it."""
        fresh = [work.store.folder for work in works if not work.store.folder.exists()]
        try:
            with ExitStack() as held:
                for work in works:
                    with failures.of([work]):
                        held.enter_context(work.store.lock())
                        if data.overwrite and self._is_stale(model, work, stages):
                            work.store.clear()
                        elif work.store.has_run():
                            work.store.settle()
                if self._log_to_run and not self.loggers:
                    self.loggers = [TensorBoardLogger(data.out, name="logs", version=self._version)]
                yield
        finally:
            for folder in fresh:
                if folder.is_dir() and os.listdir(folder) == [".lock"]:
                    (folder / ".lock").unlink()
                    folder.rmdir()

    @property
    def _version(self) -> str:
        """A folder of logs for each rank, where there are several."""
        return f"rank{self.ranks.global_rank}" if self.ranks.world_size > 1 else ""

    def _is_stale(self, model: KVInversion, work: Work, stages: Sequence[Stage]) -> bool:
        """Whether what lies in the run folder is of something else."""
        try:
            self._check(model, work, stages, overwrite=False)
        except UserError:
            return work.image is not None and work.store.has_run()
        return False

    # ---- the stages of pictures side by side

    def _through(
        self,
        model: KVInversion,
        works: list[Work],
        data: SourceImages,
        stages: Sequence[Stage],
        failures: Failures,
    ) -> None:
        """Take these pictures through the stages, each as far as it is not yet done."""
        if "invert" in stages:
            missing = list[Work]()
            for work in failures.left(works):
                with failures.of([work]):
                    missing += [] if model.is_inverted(work) else [work]
            if missing:
                self.predict(model, data.jobs("invert", missing), return_predictions=False)
            for work in failures.left(works):
                with failures.of([work]):
                    work.remember_targets()
        if "fit" in stages:
            with failures.of(works):
                self._fit(model, works, data, failures)
        if "edit" in stages and not self.fast_dev_run and (left := failures.left(works)):
            self.predict(model, data.jobs("edit", left), return_predictions=False)

    def _fit(self, model: KVInversion, works: list[Work], data: SourceImages, failures: Failures) -> None:
        """Tune pictures side by side, and those again that do not pass."""
        attempt: int | None = 0
        while attempt is not None:
            for which in model.passes(works):
                fit = model.prepare(works, attempt, which)
                data.inner_steps = fit.inner_steps
                if fit.plan:
                    self.fit_loop.epoch_progress.reset()
                    super().fit(model, datamodule=data)
                if self.fast_dev_run:
                    return
            model.certify_rest()
            if not model.network.learns:
                return  # again would be the same
            due = [next_attempt(work.store, model.demand) for work in failures.left(works)]
            attempt = min((number for number in due if number is not None), default=None)

    # ---- what is around them

    @contextmanager
    def _writing(self, data: SourceImages) -> Iterator[None]:
        """Report what Lightning and TensorBoard cannot write beside our own files."""
        try:
            yield
        except OSError as error:
            raise NoRoomError(
                f"cannot write {error.filename or data.out}: {error.strerror or error}; "
                "make room and give the same command again"
            ) from error

    @staticmethod
    def _require_targets(data: SourceImages, failures: Failures) -> None:
        for work in data.works:
            if not work.targets:
                failures.note(
                    work.label,
                    f"no target for {work.name}: say with --target what it should become (repeatable)",
                )

    def _say_where(self, works: Sequence[Work]) -> None:
        for work in works:
            found = [
                file
                for name in ("sheet.png", "reconstruction.png", "run.json")
                if (file := work.store.folder / name).exists()
            ]
            self.watch.note(f"look at {found[0] if found else work.store.folder}")
