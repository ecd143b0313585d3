"""KV Inversion as a LightningModule: a fit is a curriculum of phases, predict runs the other stages."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer

from kvinv_pl import records, registry, rounding, stages
from kvinv_pl.attention import CPAttention, Selection, Site
from kvinv_pl.backbone import Backbone
from kvinv_pl.curriculum import Batch, Convergence, SlotKeeper, batches, first_missing, remaining
from kvinv_pl.data import Job
from kvinv_pl.errors import UserError
from kvinv_pl.network import Network
from kvinv_pl.progress import Progress
from kvinv_pl.tuning import reconstruct, squared_errors
from kvinv_pl.work import Stage, Work


class KVInversion(LightningModule):
    """KV Inversion (arXiv 2309.16608) of pictures by a frozen Stable Diffusion model.

    Args:
        checkpoint: "menagerie" (the embedded model), a folder as diffusers saves it, or a hub id.
        attention: The CP-attn variant by class_path and init_args; left out, it is the paper's own, FullKV.
        target_modules: Which self-attentions carry psi: encoder, middle, decoder, all, or as in peft.
        exclude_modules: What to leave out of them, in the same words.
        layers_to_transform: Numbers of the blocks to keep, as in peft.
        layers_pattern: The module list that layers_to_transform counts.
        steps: DDIM steps T, in all stages.
        guidance: Classifier-free guidance scale w of the edit, and of tuning unless tuning_guidance is given.
        inversion_guidance: w of the inversion; 1 is the source prompt alone.
        tuning_guidance: w of tuning, with psi in both branches; 1 is the source prompt's branch alone.
        optimizer: Any torch optimiser by class_path; its state is cleared at every timestep.
        inner_steps: Optimiser steps for one timestep at most.
        tolerance: Mean squared error of the latent at which the noisiest timestep has converged.
        tolerance_growth: What is added to the tolerance at every later step.
        carry: Start psi_t from psi_(t+1), rather than every timestep from the variant's own start.
        reading: What an edit reads: frozen (the K-bar, V-bar tuning arrived at) or blend (Eq. 1 on its own).
        start: The share of the steps, counted from noise, that an edit makes before CP-attn becomes active.
        negative: What the unconditional branch is told.
        seed: Of random starts of psi.
        slots: How many pictures are tuned side by side.
        store_dtype: In which psi, K-bar and V-bar are kept on disk; int8 has a scale for each channel.
    """

    def __init__(
        self,
        checkpoint: str = "menagerie",
        attention: Callable[[Site], CPAttention] | None = None,
        target_modules: str | list[str] = "decoder",
        exclude_modules: str | list[str] | None = None,
        layers_to_transform: int | list[int] | None = None,
        layers_pattern: str | list[str] | None = None,
        steps: int = 50,
        guidance: float = 4.0,
        inversion_guidance: float = 1.0,
        tuning_guidance: float | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.Adam(p, lr=1e-2),
        inner_steps: int = 10,
        tolerance: float = 1e-5,
        tolerance_growth: float = 2e-5,
        carry: bool = True,
        reading: Literal["frozen", "blend"] = "frozen",
        start: float = 0.1,
        negative: str = "",
        seed: int = 0,
        slots: int = 1,
        store_dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16",
    ):
        """Note the settings; the checkpoint is read when a stage begins, in the precision of the trainer."""
        super().__init__()
        self.automatic_optimization = False
        self.checkpoint = checkpoint
        self.variant = attention or registry.resolve("full_kv")
        self.selection = Selection(target_modules, exclude_modules, layers_to_transform, layers_pattern)
        self.steps, self.inner_steps, self.slots = steps, inner_steps, slots
        self.guidance, self.inversion_guidance = float(guidance), float(inversion_guidance)
        self.tuning_guidance = self.guidance if tuning_guidance is None else float(tuning_guidance)
        self.optimizer = optimizer
        self.convergence = Convergence(tolerance, tolerance_growth)
        self.carry, self.seed, self.store_dtype = carry, seed, store_dtype
        self.reading, self.start, self.negative = reading, float(start), negative
        self.check_settings()
        self.watch = Progress(quiet=True)
        self.last_edits: list[Path] = []
        self._network: Network | None = None
        self._loaded: tuple[str, torch.dtype] | None = None

    def check_settings(self) -> None:
        """Refuse numbers that mean nothing."""
        for name in ("guidance", "inversion_guidance", "tuning_guidance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name}: expected a number of 0 or more, got {value}")
        for name in ("steps", "inner_steps", "slots"):
            if (count := getattr(self, name)) < 1:
                raise UserError(f"{name}: expected 1 or more, got {count}")
        if not 0 <= self.start <= 1:
            raise UserError(f"start: expected a share of the steps, 0 to 1, got {self.start}")
        if self.reading not in ("frozen", "blend"):
            raise UserError(f"reading: expected frozen or blend, got {self.reading!r}")
        if self.store_dtype not in rounding.DTYPES:
            names = ", ".join(rounding.DTYPES)
            raise UserError(f"store_dtype: expected {names}, got {self.store_dtype!r}")

    # ---- the frozen model, once

    @property
    def network(self) -> Network:
        """The model with psi attached; load_backbone() makes it."""
        if self._network is None:
            raise RuntimeError("load_backbone() comes first: the checkpoint is not loaded")
        return self._network

    def load_backbone(self, dtype: torch.dtype) -> Backbone:
        """Read the checkpoint, unless it is loaded; the U-Net and the text model are held in `dtype`."""
        if self._loaded != (self.checkpoint, dtype):
            backbone = Backbone.load(self.checkpoint, dtype)
            self._network = Network(backbone, self.variant, self.selection, self.steps)
            self._loaded = (self.checkpoint, dtype)
        return self.network.backbone

    def setup(self, stage: str) -> None:
        """Run every forward in the trainer's precision; a fit has as many epochs as phases remain."""
        self.network.autocast = self.trainer.precision_plugin.forward_context
        if stage == "fit":
            self.trainer.fit_loop.max_epochs = 1 if self._rehearsal else len(self._plan)

    @property
    def _rehearsal(self) -> bool:
        """Whether this is the trainer's fast_dev_run: one inner step of one phase."""
        return bool(getattr(self.trainer, "fast_dev_run", False))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave jobs and step numbers where they are."""
        return batch

    # ---- stages 1 and 3

    def inversion_record(self, work: Work) -> tuple[dict[str, Any], Tensor, Tensor | None]:
        """What run.json will say of this picture's inversion, its pixels and its mask."""
        return stages.inversion_record(self.network, work, self.inversion_guidance, self.negative)

    def is_inverted(self, work: Work) -> bool:
        """Whether stage 1 is done; a run that was made otherwise is refused."""
        return stages.is_inverted(self.network, work, self.inversion_guidance, self.negative)

    def check(self, work: Work, stage: Stage, anew: bool = False) -> None:
        """Refuse what cannot be worked on, or is not its folder's run, before anything is written."""
        store, fresh = work.store, anew or not work.store.has_run()
        ready = not fresh and self.is_inverted(work) and stages.is_tuned(self.network, store)
        if stage == "edit" and not ready:
            raise UserError(f"{store.folder} is not tuned to the end: go on with `kvinv fit` before editing")
        if fresh:
            _, pixels, mask = self.inversion_record(work)
            (height, width), masked = pixels.shape[-2:], mask is not None
        else:
            picture = store.read_run()["picture"]
            (width, height), masked = picture["model_size"], picture["mask"] is not None
        if stage == "fit":
            factor = self.network.backbone.vae_factor
            self.network.place((height // factor, width // factor), self.slots)
            self.network.bind(torch.ones(self.slots, height, width) if masked else None)
            record = self.tuning_record()
            if not fresh and "tuning" in store.read_run() and store.done():
                store.require({"tuning": record}, ["tuning"])

    def predict_step(self, batch: Job, batch_idx: int) -> None:
        """One stage of one picture."""
        work, watch = batch.work, self.watch
        # what is written here is read by the tuning, where inference tensors would not do
        with torch.inference_mode(False):
            if batch.stage == "edit":
                self.last_edits = stages.edit_picture(
                    self.network, work, self.guidance, self.reading, self.start, self.negative, watch
                )
            elif not self.is_inverted(work):
                stages.invert_picture(self.network, work, self.inversion_guidance, self.negative, watch)

    # ---- stage 2: the fit

    def tuning_record(self) -> dict[str, Any]:
        """What psi depends on, besides the trajectory."""
        return {
            "guidance": self.tuning_guidance,
            "negative": self.negative if self.tuning_guidance != 1 else "",
            "attention": records.of_variant(self.network.cps[0]),
            "sites": [cp.site.path for cp in self.network.cps],
            "optimizer": records.of_optimizer(self.configure_optimizers()),
            "inner_steps": self.inner_steps,
            "tolerance": [self.convergence.tolerance, self.convergence.growth],
            "carry": self.carry,
            "seed": self.seed,
            "store_dtype": self.store_dtype,
        }

    def prepare(self, works: list[Work]) -> int:
        """Make ready to fit pictures of one latent size; the number of phases that remain."""
        self._works = works
        height, width = works[0].store.trajectory().shape[-2:]
        self.network.place((height, width), self.slots)
        record, done = self.tuning_record(), [work.store.done() for work in works]
        for work, finished in zip(works, done, strict=True):
            run = work.store.read_run()
            if "tuning" in run and finished:
                work.store.require({"tuning": record}, ["tuning"])
            if first_missing(finished, self.steps) < self.steps:
                run.pop("reconstruction", None)
                work.store.write_run({**run, "tuning": record})
        self._batches = batches(done, self.steps, self.slots)
        self._plan = remaining(self._batches, self.steps)
        return len(self._plan)

    def certify_rest(self, works: list[Work]) -> None:
        """Do what a fit that was stopped after its last phase has left undone."""
        for work in works:
            if "reconstruction" not in work.store.read_run():
                stages.certify(self.network, work.store)

    def configure_optimizers(self) -> Optimizer:
        """One optimiser for the live psi."""
        try:
            optimizer = self.optimizer(self.network.psi.parameters())
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer: {error}; give it arguments that it takes") from error
        if self.slots > 1 and _needs_closure(optimizer) and not _reads_residuals(optimizer):
            kind = type(optimizer).__name__
            raise UserError(f"{kind} would share its steps between pictures side by side: use slots 1")
        return optimizer

    def _optimizer(self) -> Optimizer:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        return optimizer  # pyright: ignore[reportReturnType]

    def on_train_epoch_start(self) -> None:
        """A phase begins: z-tilde_t, its pivot, and where psi_t starts."""
        self._phase = self._plan[self.current_epoch]
        batch, i = self._batches[self._phase.batch], self._phase.step
        self.network.attached()
        self.network.front.forget()
        if i == batch.first:
            self._enter(batch)
        if i == 0 or not self.carry:
            pictures = [self._works[m].store.read_run()["picture"]["sha256"] for m in batch.members]
            self.network.reset(self.seed, pictures, i)
            self.network.observe(self._z, self._t(i), self._contexts)
        self._pivot = self._pivots[self.steps - i - 1]
        self._optimizer().state.clear()
        idle = torch.tensor([not active for active in batch.active]) | (not self.network.table.has_effect(i))
        self._keeper = SlotKeeper(self.network.psi.parameters(), self.slots, idle)
        self._used = torch.zeros(self.slots, dtype=torch.long)
        self._first_errors: Tensor | None = None

    def _enter(self, batch: Batch) -> None:
        """Take up a batch of pictures at the step where it goes on."""
        works = [self._works[m] for m in batch.members]
        self._pivots = torch.stack([work.store.trajectory() for work in works], 1).to(self.device)
        self._z = self._pivots[-1]
        if batch.first:
            before = [work.store.step(batch.first - 1) for work in works]
            self._z = torch.stack([step.z for step in before]).to(self.device)
            for slot, step in enumerate(before):  # psi_(t+1), as it was stored
                self.network.read(step.psi, slot)
        texts = [self.negative] * len(works) + [work.source for work in works]
        self._contexts = self.network.backbone.embed(texts).unflatten(0, (2, -1))
        self.network.bind(stages.masks_of([work.store for work in works]))
        name = works[0].name if self.slots == 1 else f"{sum(batch.active)} pictures"
        self.watch.begin("tuning", name, self.steps - batch.first)

    def _t(self, i: int) -> Tensor:
        return self.network.table.timesteps[i].to(self.device).expand(self.slots)

    def _reconstruct(self) -> Tensor:
        """z-tilde_{t-1} for every slot."""
        eps = self.network.guided_eps(self._contexts, self.tuning_guidance)
        return reconstruct(eps, self._z, self.network.table, self._phase.step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """While not converged: the phase is over when every slot has stopped."""
        return -1 if self._keeper.all_stopped else None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One optimiser step of Eq. 3 for the slots that have not converged."""
        optimizer = self._optimizer()
        with self.network.attached().blend(), self.network.front.kept():
            z = self._reconstruct()
            errors = squared_errors(self._pivot, z)
            self._check_finite(errors)
            means = (errors.detach() / self._pivot[0].numel()).cpu()
            self._first_errors = means if self._first_errors is None else self._first_errors
            self._keeper.stop(self.convergence.reached(means, self._phase.step))
            if self._keeper.all_stopped:
                return
            running = ~self._keeper.stopped
            self._used += running
            t, loss = int(self.network.table.timesteps[self._phase.step]), float(means[running].mean())
            self.watch.show(f"timestep {t}, inner step {batch_idx}, loss {loss:.2e}")
            running = running.to(self.device)

            values, known = list(self.network.psi.parameters()), [z]
            at = [value._version for value in values]

            def residuals() -> Tensor:
                # an optimiser begins where psi is, and what is missed there has been computed
                fresh = known and at == [value._version for value in values]
                missed = ((known.pop() if fresh else self._reconstruct()) - self._pivot).flatten(1)
                return torch.where(running[:, None], missed, 0)

            def lowered() -> float:
                optimizer.zero_grad()
                total = residuals().square().sum()
                self.manual_backward(total)
                return float(total.detach())

            if _needs_closure(optimizer):
                closure: Any = residuals if _reads_residuals(optimizer) else lowered
                optimizer.step(closure)
            else:
                optimizer.zero_grad()
                self.manual_backward(errors[running].sum())
                optimizer.step()
        self._keeper.restore()

    def _check_finite(self, errors: Tensor) -> None:
        if not errors.isfinite().all():
            raise UserError(
                f"the reconstruction is no longer finite at step {self._phase.step}: use a lower "
                "learning rate or guidance scale, or precision 32-true"
            )

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """A phase ends: round psi_t as it is stored, advance z-tilde with it, and write both."""
        batch, i = self._batches[self._phase.batch], self._phase.step
        for value in self.network.psi.parameters():
            value.copy_(rounding.rounded(value, self.store_dtype))
        with self.network.attached().recording() as kv, self.network.front.kept():
            self._z = self._reconstruct()
        self.network.front.forget()
        ends = (squared_errors(self._pivot, self._z) / self._pivot[0].numel()).cpu()
        self._check_finite(ends)
        begins = ends if self._first_errors is None else self._first_errors
        self.watch.advance(f"loss {float(ends.mean()):.2e}")
        if self._rehearsal:
            return  # a phase cut short is not worth keeping
        for slot, work in self._active(batch):
            psi = {name: value[slot].cpu() for name, value in self.network.values().items()}
            bars = {path: (k[:, slot].cpu(), v[:, slot].cpu()) for path, (k, v) in kv.items()}
            figures = {
                "loss_start": float(begins[slot]),
                "loss_end": float(ends[slot]),
                "inner_steps": int(self._used[slot]),
            }
            work.store.save_step(i, psi, self._z[slot].cpu(), bars, figures, self.store_dtype)
            for logger in self.loggers:
                name = work.store.folder.name
                logger.log_metrics({f"{name}/{key}": value for key, value in figures.items()}, step=i)
        if i == self.steps - 1:
            worth = [stages.certify(self.network, work.store) for _, work in self._active(batch)]
            shown = ", ".join(f"{quality:.1f}" for quality in worth)
            self.watch.finish(f"reconstruction {shown} dB to the VAE round trip")

    def _active(self, batch: Batch) -> list[tuple[int, Work]]:
        """The slots of a batch that are no padding, and the pictures in them."""
        pairs = enumerate(zip(batch.members, batch.active, strict=True))
        return [(slot, self._works[member]) for slot, (member, active) in pairs if active]


def _reads_residuals(optimizer: Any) -> bool:
    """Whether the closure is to return what is missed, slot by slot, as GaussNewtonDescent wants it."""
    return bool(getattr(getattr(optimizer, "optimizer", optimizer), "reads_residuals", False))


def _needs_closure(optimizer: Any) -> bool:
    """Whether the optimiser evaluates the loss itself, as L-BFGS does."""
    step = getattr(optimizer, "optimizer", optimizer).step
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
