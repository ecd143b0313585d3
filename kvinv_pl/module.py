"""KV Inversion as a LightningModule: a fit is a curriculum of phases, predict runs the other stages."""

import inspect
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer

from kvinv_pl import certificate, logbook, memory, records, registry, rounding, stages
from kvinv_pl.attention import CPAttention, Selection, Site
from kvinv_pl.backbone import Backbone
from kvinv_pl.curriculum import Batch, Convergence, SlotKeeper, batches, first_missing, remaining
from kvinv_pl.data import Job
from kvinv_pl.ddim import predicted_z_0
from kvinv_pl.errors import UserError
from kvinv_pl.failures import Failures
from kvinv_pl.network import Network
from kvinv_pl.progress import Progress
from kvinv_pl.reading import subject_positions
from kvinv_pl.store import Step
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
        max_grid: Only self-attentions of at most max_grid x max_grid tokens; left out, of any size.
        steps: DDIM steps T, in all stages; with few, such as 10, most edits miss the action.
        guidance: Classifier-free guidance scale w of the edit, and of tuning unless tuning_guidance is given.
        inversion_guidance: w of the inversion; 1 is the source prompt alone.
        tuning_guidance: w of tuning, with psi in both branches; 1 is the source prompt's branch alone.
        optimizer: Any torch optimiser by class_path; its state is cleared at every timestep.
        inner_steps: Optimiser steps for one timestep at most.
        tolerance: Mean squared error of the latent at which the noisiest timestep has converged.
        tolerance_growth: What is added to the tolerance at every later step.
        carry: Start psi_t from psi_(t+1), rather than every timestep from the variant's own start.
        reading: What an edit reads: frozen (the K-bar, V-bar tuning arrived at) or blend (Eq. 1 on its own).
        kv: Where frozen has K-bar, V-bar from: stored (on disk, with psi) or replayed (psi alone is on disk,
            and the source's pass runs beside the edits: n edits cost as n + 1).
        start: The share of the steps, counted from noise, that an edit makes before CP-attn becomes active.
        negative: What the unconditional branch is told.
        subject: The word for the subject in the targets, for variants that follow it through an edit; left
            out, it is the last word that source and target have in common before they differ.
        seed: Of random starts of psi.
        slots: How many pictures of one size are tuned side by side; auto: what fits into memory, 8 at most.
        store_dtype: In which psi, K-bar and V-bar are kept on disk; int8 has a scale for each channel.
        required_psnr: dB to the VAE round trip that a reconstruction must reach for its picture to pass.
        retries: How often to tune a picture again that does not pass, each time with twice the inner steps
            and other random starts; the best attempt is kept.
    """

    def __init__(
        self,
        checkpoint: str = "menagerie",
        attention: Callable[[Site], CPAttention] | None = None,
        target_modules: str | list[str] = "decoder",
        exclude_modules: str | list[str] | None = None,
        layers_to_transform: int | list[int] | None = None,
        layers_pattern: str | list[str] | None = None,
        max_grid: int | None = None,
        steps: int = 50,
        guidance: float = 9.0,
        inversion_guidance: float = 1.0,
        tuning_guidance: float | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.Adam(p, lr=3e-2),
        inner_steps: int = 3,
        tolerance: float = 1e-5,
        tolerance_growth: float = 2e-5,
        carry: bool = True,
        reading: Literal["frozen", "blend"] = "frozen",
        kv: Literal["stored", "replayed"] = "stored",
        start: float = 0.0,
        negative: str = "",
        subject: str | None = None,
        seed: int = 0,
        slots: int | Literal["auto"] = "auto",
        store_dtype: rounding.StoreDtype = "float16",
        required_psnr: float = 35.0,
        retries: int = 1,
    ):
        """Note the settings; the checkpoint is read when a stage begins, in the precision of the trainer."""
        super().__init__()
        self.automatic_optimization = False
        self.checkpoint = checkpoint
        self.variant = attention or registry.resolve("full_kv")
        self.selection = Selection(
            target_modules, exclude_modules, layers_to_transform, layers_pattern, max_grid
        )
        self.steps, self.inner_steps, self.slots = steps, inner_steps, slots
        self.guidance, self.inversion_guidance = float(guidance), float(inversion_guidance)
        self.tuning_guidance = self.guidance if tuning_guidance is None else float(tuning_guidance)
        self.optimizer = optimizer
        self.convergence = Convergence(tolerance, tolerance_growth)
        self.carry, self.seed, self.store_dtype = carry, seed, store_dtype
        self.reading, self.kv, self.start, self.negative = reading, kv, float(start), negative
        self.subject = subject
        self.demand = certificate.Demand(float(required_psnr), retries)
        self.check_settings()
        self.side_by_side = 1 if slots == "auto" else slots
        self.watch, self.failures, self.x_0_every = Progress(quiet=True), Failures(), 0  # the trainer's
        self.last_edits: list[Path] = []
        self._network: Network | None = None
        self._loaded: tuple[str, torch.dtype] | None = None

    def check_settings(self) -> None:
        """Refuse numbers that mean nothing."""
        for name in ("guidance", "inversion_guidance", "tuning_guidance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name}: expected a finite number of 0 or more, got {value}")
        for name in ("steps", "inner_steps", "slots"):
            if (count := getattr(self, name)) != "auto" and count < 1:
                raise UserError(f"{name}: expected 1 or more, got {count}")
        if math.isnan(self.demand.psnr) or self.demand.retries < 0:
            raise UserError(
                "required_psnr and retries: expected dB and a number of 0 or more, got "
                f"{self.demand.psnr} and {self.demand.retries}"
            )
        if not 0 <= self.start <= 1:
            raise UserError(f"start: expected a share of the steps, 0 to 1, got {self.start}")
        if self.reading not in ("frozen", "blend"):
            raise UserError(f"reading: expected frozen or blend, got {self.reading!r}")
        if self.kv not in ("stored", "replayed"):
            raise UserError(f"kv: expected stored or replayed, got {self.kv!r}")
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

    def check(self, work: Work, stage: Stage, anew: bool = False) -> tuple[int, int, bool]:
        """Refuse what cannot be worked on, or is not its folder's run, before anything is written.

        Returns:
            What pictures side by side have in common: the latents' height and width, and a mask or none.
        """
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
        factor = self.network.backbone.vae_factor
        grid = (height // factor, width // factor)
        if stage != "invert":
            self.network.place(grid, self.side_by_side if stage == "fit" else 1)
            if why := self.network.why_not(self.reading):
                other = {"frozen": "blend", "blend": "frozen"}[self.reading]
                raise UserError(f"reading: expected {other}, got {self.reading}: {why}")
            variant = self.network.cps[0]
            if variant.wants_mask and not masked:
                raise UserError(
                    f"{type(variant).__name__} needs a mask of the subject: "
                    "give --mask (`kvinv mask` makes one)"
                )
            if self.subject and not variant.follows:
                raise UserError(
                    f"subject: got {self.subject!r}, but {type(variant).__name__} does not follow it: "
                    "leave it out"
                )
            if variant.follows:  # rather than after the tuning
                subject_positions(self.network.backbone, work.source, work.targets, self.subject)
        if stage == "fit":
            self.network.bind(torch.ones(self.side_by_side, height, width) if masked else None)
            record = self.tuning_record()
            if not fresh and "tuning" in store.read_run() and store.done():
                store.require({"tuning": record}, ["tuning"])
        return (*grid, masked)

    def predict_step(self, batch: Job, batch_idx: int) -> None:
        """One stage of one picture."""
        work, watch = batch.work, self.watch
        # what is written here is read by the tuning, where inference tensors would not do
        with torch.inference_mode(False), self.failures.of([work]):
            if batch.stage == "edit":
                self.last_edits = stages.edit_picture(
                    self.network,
                    work,
                    self.guidance,
                    self.reading,
                    self.kv,
                    self.start,
                    self.negative,
                    self.subject,
                    watch,
                    batch.again,
                )
            elif not self.is_inverted(work):
                stages.invert_picture(self.network, work, self.inversion_guidance, self.negative, watch)

    # ---- stage 2: the fit

    def tuning_record(self) -> dict[str, Any]:
        """What psi depends on, besides the trajectory."""
        optimizer = self.configure_optimizers()
        return {
            "guidance": self.tuning_guidance,
            "negative": self.negative if self.tuning_guidance != 1 else "",
            "attention": records.of_variant(self.network.cps[0]),
            "sites": [cp.site.path for cp in self.network.cps],
            "max_grid": self.selection.max_grid,
            "kv": self.kv,
            "optimizer": records.of_optimizer(optimizer) if optimizer else None,
            "inner_steps": self.inner_steps if optimizer else 0,
            "tolerance": [self.convergence.tolerance, self.convergence.growth],
            "carry": self.carry,
            "seed": self.seed,
            "store_dtype": self.store_dtype,
        }

    def editing_record(self) -> dict[str, Any]:
        """What an edit of the run takes where nothing else is said."""
        return {key: getattr(self, key) for key in ("guidance", "reading", "start", "negative", "subject")}

    def choose_slots(self, grid: tuple[int, int], pictures: int) -> int:
        """How many of so many pictures of one latent size are tuned side by side; said where it was not."""
        if self.slots == "auto":
            self.side_by_side = 1
            self.network.place(grid, 1)
            if pictures > 1 and not _needs_closure(self.configure_optimizers()):
                self.side_by_side, reason = memory.side_by_side(
                    self.network, grid, self.tuning_guidance, pictures
                )
                self.watch.note(f"slots: {self.side_by_side} of {pictures} pictures side by side ({reason})")
        return self.side_by_side

    def prepare(self, works: list[Work], attempt: int = 0) -> int:
        """Make ready to fit pictures of one latent size, at this attempt; the phases that remain."""
        self._attempt, self._works = attempt, list[Work]()
        done: list[set[int] | None] = []
        for work in works:
            with self.failures.of([work]):
                found = replace(work, store=work.store.at_attempt(attempt))
                done.append(self._missing(found))
                self._works.append(found)
        self._batches = batches(done, self.steps, self.side_by_side)
        self._plan = remaining(self._batches, self.steps)
        return len(self._plan)

    def _missing(self, work: Work) -> set[int] | None:
        """What is done of a picture's tuning, None if all is; run.json then says how the rest is made."""
        height, width = work.store.trajectory().shape[-2:]
        self.network.place((height, width), self.side_by_side)
        record, finished, run = self.tuning_record(), work.store.done(), work.store.read_run()
        if self._attempt:
            return finished if self._is_due(work) else None
        if "tuning" in run and finished:
            work.store.require({"tuning": record}, ["tuning"])
        if first_missing(finished, self.steps) < self.steps:
            work.store.drop_attempts()
            run.pop("reconstruction", None)
            work.store.write_run({**run, "tuning": record, "editing": self.editing_record()})
        return finished if self._is_due(work) else None

    def _is_due(self, work: Work) -> bool:
        """Whether this attempt at a picture's tuning is still to be made, or to be certified."""
        if self._attempt:
            return certificate.next_attempt(work.store, self.demand) == self._attempt
        return not certificate.is_certified(work.store)

    @property
    def inner_steps_now(self) -> int:
        """Optimiser steps for one timestep at most, in this attempt."""
        return self.inner_steps * 2**self._attempt

    def certify_rest(self) -> None:
        """Do what a fit that was stopped after its last phase has left undone."""
        for work in self._works:
            with self.failures.of([work]):
                if work not in self.failures and self._is_due(work):
                    self._certify(work)

    def _certify(self, work: Work) -> float:
        """Write the certificate of a tuned picture; its PSNR to the VAE round trip in dB."""
        record = certificate.certify(
            self.network, work.store, self.demand, self._attempt, self.inner_steps_now
        )
        logbook.log_result(self.loggers, work.store.folder.name, record)
        return record["psnr_to_round_trip"]

    def configure_optimizers(self) -> Optimizer | None:
        """One optimiser for the live psi; none for a variant that learns nothing."""
        parameters = list(self.network.psi.parameters())
        if not parameters:
            return None
        try:
            optimizer = self.optimizer(parameters)
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer: {error}; give it arguments that it takes") from error
        if self.side_by_side > 1 and _needs_closure(optimizer) and not _reads_residuals(optimizer):
            kind = type(optimizer).__name__
            raise UserError(f"{kind} would share its steps between pictures side by side: use slots 1")
        return optimizer

    def _optimizer(self) -> Optimizer:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        return optimizer  # pyright: ignore[reportReturnType]

    def on_train_start(self) -> None:
        """Note the optimiser as it is when new, for every phase to begin with."""
        groups = self._optimizer().param_groups
        self._new = [deepcopy({key: group[key] for key in group if key != "params"}) for group in groups]

    def _renew_optimizer(self) -> None:
        """Clear what it keeps, in its groups too; in place, because Lightning's wrapper shares it."""
        optimizer = self._optimizer()
        optimizer.state.clear()
        for group, new in zip(optimizer.param_groups, self._new, strict=True):
            for key in group.keys() - new.keys() - {"params"}:
                del group[key]
            group.update(deepcopy(new))

    def on_train_epoch_start(self) -> None:
        """A phase begins: z-tilde_t, its pivot, and where psi_t starts."""
        self._phase = self._plan[self.current_epoch]
        batch, i = self._batches[self._phase.batch], self._phase.step
        self.network.attached()
        self.network.front.forget()
        if i == batch.first:
            self._enter(batch)
        self._first_errors: Tensor | None = None
        idle = self._lost | (not self.network.table.has_effect(i))
        self._used = torch.zeros(self.side_by_side, dtype=torch.long)
        if not self._active(batch):
            self._keeper = SlotKeeper([], self.side_by_side, torch.ones_like(idle))
            return
        if i == 0 or not self.carry:
            self.network.reset(self.seed + self._attempt, self._pictures, i)
            self.network.observe(self._z, self._t(i), self._contexts)
        self._pivot = self._pivots[self.steps - i - 1]
        self._renew_optimizer()
        self._new_scale()
        learned = list(self.network.psi.parameters())
        self._keeper = SlotKeeper(learned, self.side_by_side, idle | (not learned))

    def _new_scale(self) -> None:
        """Loss scaling (16-mixed) knows nothing of the phase before, as the optimiser does not."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.trainer.precision_plugin.scaler = type(scaler)(self.device.type)  # pyright: ignore[reportAttributeAccessIssue]

    def _enter(self, batch: Batch) -> None:
        """Take up a batch of pictures at the step where it goes on."""
        self._lost = ~torch.tensor(batch.active)
        found: list[tuple[Work, Tensor, Step | None, Tensor | None] | None] = [None] * len(batch.members)
        for slot, work in self._active(batch):
            with self.failures.of([work]):
                before = work.store.step(batch.first - 1) if batch.first else None
                found[slot] = (work, work.store.trajectory(), before, stages.mask_of(work.store))
        spare = next((one for one in found if one is not None), None)
        if spare is None:
            return
        self._lost |= torch.tensor([one is None for one in found])
        rows = [one or spare for one in found]  # an empty slot is a copy that counts for nothing
        self._pivots = torch.stack([trajectory for _, trajectory, _, _ in rows], 1).to(self.device)
        self._z = self._pivots[-1].clone()
        for slot, (_, _, before, _) in enumerate(rows):
            if before is not None:
                self._z[slot] = before.z.to(self.device)
                self.network.read(before.psi, slot)  # psi_(t+1), as it was stored
        works = [work for work, _, _, _ in rows]
        self._pictures = [work.store.read_run()["picture"]["sha256"] for work in works]
        texts = [self.negative] * len(works) + [work.source for work in works]
        self._contexts = self.network.backbone.embed(texts).unflatten(0, (2, -1))
        masks = [mask for _, _, _, mask in rows if mask is not None]
        self.network.bind(torch.stack(masks) if masks else None)
        active = self._active(batch)
        name = active[0][1].name if len(active) == 1 else f"{len(active)} pictures"
        again = f" again, with {self.inner_steps_now} inner steps" if self._attempt else ""
        self.watch.begin("tuning", f"{name}{again}", self.steps - batch.first)

    def _t(self, i: int) -> Tensor:
        return self.network.table.timesteps[i].to(self.device).expand(self.side_by_side)

    def _reconstruct(self, z: Tensor | None = None) -> Tensor:
        """z-tilde_{t-1} for every slot, from z-tilde_t or from z."""
        eps = self.network.guided_eps(self._contexts, self.tuning_guidance)
        return reconstruct(eps, self._z if z is None else z, self.network.table, self._phase.step)

    def _advance(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Move z-tilde on with psi as it is stored; the K-bar and V-bar that an edit reads."""
        attachment = self.network.attached()
        if not self.network.at_pivot:
            with attachment.recording() as kv, self.network.front.kept():
                self._z = self._reconstruct()
            return kv
        with attachment.recording() as kv:
            self._reconstruct(self._pivots[self.steps - self._phase.step])
        with attachment.frozen(kv):  # as an edit to the source prompt would
            self._z = self._reconstruct()
        return kv

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """While not converged: the phase is over when every slot has stopped."""
        return -1 if self._keeper.all_stopped else None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One optimiser step of Eq. 3 for the slots that have not converged."""
        optimizer = self._optimizer()
        with self.network.attached().blend(), self.network.front.kept():
            z = self._reconstruct()
            errors = squared_errors(self._pivot, z)
            self._give_up_unless_finite(errors)
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
                z = known.pop() if fresh else self._reconstruct()
                return torch.where(running[:, None], (z - self._pivot).flatten(1), 0)

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
                if bool(self._lost.any()):
                    self._keeper.silence(self._lost)
                optimizer.step()
        self._keeper.restore()

    def _give_up_unless_finite(self, errors: Tensor) -> None:
        """A picture whose latents have run away is given up; those beside it go on."""
        batch, lost = self._batches[self._phase.batch], ~errors.detach().isfinite().cpu() & ~self._lost
        if not bool(lost.any()):
            return
        for slot, work in self._active(batch):
            if lost[slot]:
                self.failures.note(
                    work.label,
                    f"the reconstruction is no longer finite at step {self._phase.step}: use a lower "
                    "learning rate or guidance scale, or precision 32-true",
                )
        self._lost |= lost
        self._keeper.give_up(lost)

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """A phase ends: round psi_t as it is stored, advance z-tilde with it, and write both."""
        batch, i = self._batches[self._phase.batch], self._phase.step
        if not self._active(batch):
            return
        self._keeper.restore()
        for value in self.network.values().values():
            value.copy_(rounding.rounded(value, self.store_dtype))
        before = self._z
        kv = self._advance()
        self.network.front.forget()
        ends = (squared_errors(self._pivot, self._z) / self._pivot[0].numel()).cpu()
        self._give_up_unless_finite(ends)
        self._z = torch.where(self._lost.to(self.device)[:, None, None, None], self._pivot, self._z)
        begins = ends if self._first_errors is None else self._first_errors
        self.watch.advance(f"loss {float(ends[~self._lost].mean()):.2e}")
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
            stored = bars if self.kv == "stored" else None
            with self.failures.of([work]):
                work.store.save_step(i, psi, self._z[slot].cpu(), stored, figures, self.store_dtype)
            logbook.log_phase(self.loggers, self._logged_as(work), i, figures, self.device)
            self._show_z_0(work, before[slot : slot + 1], self._z[slot : slot + 1])
        if i == self.steps - 1:
            worth = list[float]()
            for _, work in self._active(batch):
                with self.failures.of([work]):
                    worth.append(self._certify(work))
            below = sum(value < self.demand.psnr for value in worth)
            missed = f"; {below} below the {self.demand.psnr:g} dB asked for" if below else ""
            shown = ", ".join(f"{value:.1f}" for value in worth)
            self.watch.finish(f"reconstruction {shown} dB to the VAE round trip{missed}")

    def _logged_as(self, work: Work) -> str:
        """The name of a picture in the logs; later attempts have curves of their own."""
        return work.store.folder.name + (f"-attempt-{self._attempt + 1}" if self._attempt else "")

    def _show_z_0(self, work: Work, z_from: Tensor, z_to: Tensor) -> None:
        """Every few steps, hand the loggers the picture that the process believes in (the paper's Fig. 3)."""
        table, i = self.network.table, self._phase.step
        if self.loggers and self.x_0_every and i % self.x_0_every == 0 and table.has_effect(i):
            z_0 = predicted_z_0(z_from, z_to, table.alphas[i], table.alphas[i + 1])
            pixels = self.network.backbone.decode(z_0)[0].cpu()
            logbook.log_picture(self.loggers, f"{self._logged_as(work)}/predicted_x_0", i, pixels)

    def _active(self, batch: Batch) -> list[tuple[int, Work]]:
        """The slots of a batch that count, and the pictures in them: no padding, and nothing given up."""
        pairs = enumerate(zip(batch.members, batch.active, strict=True))
        found = [(slot, self._works[member]) for slot, (member, active) in pairs if active]
        return [(slot, work) for slot, work in found if work not in self.failures]


def _reads_residuals(optimizer: Any) -> bool:
    """Whether the closure is to return what is missed, slot by slot, as GaussNewtonDescent wants it."""
    return bool(getattr(getattr(optimizer, "optimizer", optimizer), "reads_residuals", False))


def _needs_closure(optimizer: Any) -> bool:
    """Whether the optimiser evaluates the loss itself, as L-BFGS does."""
    step = getattr(optimizer, "optimizer", optimizer).step
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
