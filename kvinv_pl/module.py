"""KV Inversion as a LightningModule: a fit is a curriculum of phases, one timestep each; predict runs the other stages."""

import inspect
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from kvinv_pl import pictures, records, registry
from kvinv_pl.attention import Attachment, CPAttention, Selection, Site, attach, select, self_attentions
from kvinv_pl.backbone import Backbone
from kvinv_pl.curriculum import Batch, Convergence, SlotKeeper, batches, first_missing, generator, remaining
from kvinv_pl.data import Job, Work
from kvinv_pl.ddim import StepTable
from kvinv_pl.editing import edit, first_step, guided
from kvinv_pl.errors import UserError
from kvinv_pl.inversion import invert
from kvinv_pl.progress import Progress
from kvinv_pl.sheet import sheet
from kvinv_pl.store import RunStore, Step
from kvinv_pl.tuning import reconstruct, squared_errors

STORE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
        reading: What an edit reads: frozen (the K-bar and V-bar that tuning arrived at) or blend (Eq. 1 on its own).
        start: The share of the steps, counted from noise, that an edit makes before CP-attn becomes active.
        negative: What the unconditional branch is told.
        seed: Of random starts of psi.
        slots: How many pictures are tuned side by side.
        store_dtype: In which psi, K-bar and V-bar are kept on disk.
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
        store_dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    ):
        """Note the settings; the checkpoint is read when a stage begins, in the precision of the trainer."""
        super().__init__()
        self.automatic_optimization = False
        self.checkpoint = checkpoint
        self.variant = attention or registry.resolve("full_kv")
        self.selection = Selection(target_modules, exclude_modules, layers_to_transform, layers_pattern)
        self.steps = steps
        self.guidance, self.inversion_guidance = float(guidance), float(inversion_guidance)
        self.tuning_guidance = self.guidance if tuning_guidance is None else float(tuning_guidance)
        self.optimizer, self.inner_steps = optimizer, inner_steps
        self.convergence = Convergence(tolerance, tolerance_growth)
        self.carry, self.reading, self.start, self.negative = carry, reading, start, negative
        self.seed, self.slots, self.store_dtype = seed, slots, store_dtype
        self.check_settings()
        self.watch = Progress(quiet=True)
        self.last_edits: list[Path] = []
        self.psi = nn.ModuleDict()
        self._attachment: Attachment | None = None
        self._loaded: tuple[str, torch.dtype] | None = None

    def check_settings(self) -> None:
        """Refuse numbers that mean nothing."""
        scales = {
            "guidance": self.guidance,
            "inversion_guidance": self.inversion_guidance,
            "tuning_guidance": self.tuning_guidance,
        }
        for name, value in scales.items():
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name}: expected a number of 0 or more, got {value}")
        for name, count in {
            "steps": self.steps,
            "inner_steps": self.inner_steps,
            "slots": self.slots,
        }.items():
            if count < 1:
                raise UserError(f"{name}: expected 1 or more, got {count}")
        if not 0 <= self.start <= 1:
            raise UserError(f"start: expected a share of the steps, 0 to 1, got {self.start}")
        if self.reading not in ("frozen", "blend"):
            raise UserError(f"reading: expected frozen or blend, got {self.reading!r}")
        if self.store_dtype not in STORE_DTYPES:
            raise UserError(f"store_dtype: expected {', '.join(STORE_DTYPES)}, got {self.store_dtype!r}")

    # ------------------------------------------------------------------------------------------ the frozen model

    def load_backbone(self, dtype: torch.dtype) -> Backbone:
        """Read the checkpoint, once; the U-Net and the text model are held in `dtype`."""
        if self._loaded != (self.checkpoint, dtype):
            self.release()
            self.backbone = Backbone.load(self.checkpoint, dtype)
            self.table: StepTable = self.backbone.step_table(self.steps)
            self._loaded = (self.checkpoint, dtype)
        return self.backbone

    def sites(self, grid: tuple[int, int], slots: int) -> list[Site]:
        """The chosen self-attentions for latents of this height and width."""
        found = select(self_attentions(self.backbone.unet, grid), self.selection)
        return [Site(site.path, slots, site.grid, site.dim, site.heads) for site in found]

    def place(self, grid: tuple[int, int], slots: int) -> Attachment:
        """Psi for latents of this height and width, attached; an earlier one of another shape is taken off."""
        sites = self.sites(grid, slots)
        if self._attachment is None or [cp.site for cp in self._attachment.psi.values()] != sites:
            self.release()
            made = {site.path: self.variant(site) for site in sites}
            # a ModuleDict's keys have no dots
            self.psi = nn.ModuleDict({path.replace(".", "/"): cp for path, cp in made.items()}).to(
                self.device
            )
            self._attachment = attach(self.backbone.unet, made)
        self._attachment.check()
        return self._attachment

    def release(self) -> None:
        """Leave the U-Net as it was."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment, self.psi = None, nn.ModuleDict()

    def _branches(self, z: Tensor, t: Tensor, contexts: Tensor) -> Tensor:
        """Epsilon of every branch: `contexts` is (branches, L, d) or (branches, rows, L, d); (branches, rows, ...)."""
        branches = len(contexts)
        if contexts.ndim == 3:
            contexts = contexts[:, None].expand(-1, len(z), -1, -1)
        with self.trainer.precision_plugin.forward_context() if self._trainer else nullcontext():
            eps = self.backbone.eps(z.repeat(branches, 1, 1, 1), t.repeat(branches), contexts.flatten(0, 1))
        return eps.unflatten(0, (branches, -1))

    def _guided_eps(self, contexts: Tensor, w: float) -> Callable[[Tensor, Tensor], Tensor]:
        """eps(z, t) under guidance w; contexts (2, slots, L, d), unconditional first. At w = 1 one branch runs."""

        def eps(z: Tensor, t: Tensor) -> Tensor:
            out = self._branches(z, t, contexts[1:] if w == 1 else contexts)
            return guided(out[0], out[-1], w)

        return eps

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Jobs and step numbers stay where they are."""
        return batch

    def predict_step(self, batch: Job, batch_idx: int) -> str:
        """One stage of one picture; its name."""
        with torch.inference_mode(False), torch.no_grad():
            (self._invert if batch.stage == "invert" else self._edit)(batch.work)
        return batch.work.name

    # ------------------------------------------------------------------------------------------ stage 1: inversion

    def invert_record(self, work: Work) -> tuple[dict[str, Any], Tensor, Tensor | None]:
        """What run.json will say of the inversion, the pixels as the model takes them, and the mask."""
        assert work.image is not None
        picture = pictures.open_picture(work.image)
        geometry = pictures.fit_geometry(
            picture.image.size, self.backbone.sample_size, self.backbone.multiple, work.geometry
        )
        pixels = pictures.to_pixels(picture.image, geometry)
        mask = pictures.open_picture(work.mask) if work.mask else None
        record = {
            "model": self.backbone.identity,
            "scheduler": records.of_table(self.table, self.backbone.predicts_v),
            "picture": records.of_picture(
                work.name, picture, geometry, work.geometry, mask.sha256 if mask else None
            ),
            "source": work.source,
            "inversion": {
                "guidance": self.inversion_guidance,
                "negative": self.negative if self.inversion_guidance != 1 else "",
            },
            "versions": records.versions(),
        }
        return record, pixels, pictures.to_mask(mask.image, geometry) if mask else None

    def is_inverted(self, work: Work) -> bool:
        """Whether the trajectory is there; a run made otherwise is refused by the field that differs."""
        store = work.store
        if not store.has_run():
            return False
        if work.image is not None:
            store.require(self.invert_record(work)[0], records.INVERTED)
        else:
            expected = {
                "model": self.backbone.identity,
                "scheduler": records.of_table(self.table, self.backbone.predicts_v),
            }
            store.require(expected, expected)
        return store.has_trajectory()

    def _invert(self, work: Work) -> None:
        if self.is_inverted(work):
            return
        record, pixels, mask = self.invert_record(work)
        z_0 = self.backbone.encode(pixels[None].to(self.device))
        self.watch.begin("inverting", work.name, len(self.table))
        contexts = self.backbone.embed([record["inversion"]["negative"], work.source])[:, None]
        with self._attachment_off():
            z = invert(
                self._guided_eps(contexts, self.inversion_guidance), z_0, self.table,
                lambda i: self.watch.advance(f"timestep {int(self.table.timesteps[i])}"),
            )  # fmt: skip
        geometry = records.geometry_of(record["picture"])
        if mask is not None:
            work.store.save_picture(
                "mask", pictures.to_image(mask[None].expand(3, -1, -1) * 2 - 1, geometry).convert("L")
            )
        work.store.save_picture("source", pictures.to_image(pixels, geometry))
        work.store.save_trajectory(z[:, 0].cpu())
        work.store.write_run(record)
        self.watch.finish()

    @contextmanager
    def _attachment_off(self) -> Iterator[None]:
        """Outside blend, frozen and recording the processors do what was there before; make sure they are ours."""
        if self._attachment is not None:
            self._attachment.check()
        yield

    # --------------------------------------------------------------------------------------------- stage 2: tuning

    def tuning_record(self) -> dict[str, Any]:
        """What psi depends on, besides the trajectory."""
        cps = [cp for cp in self.psi.values() if isinstance(cp, CPAttention)]
        return {
            "guidance": self.tuning_guidance,
            "negative": self.negative if self.tuning_guidance != 1 else "",
            "attention": records.of_variant(cps[0]),
            "sites": [cp.site.path for cp in cps],
            "optimizer": records.of_optimizer(self.optimizer(self.psi.parameters())),
            "inner_steps": self.inner_steps,
            "tolerance": [self.convergence.tolerance, self.convergence.growth],
            "carry": self.carry,
            "seed": self.seed,
            "store_dtype": self.store_dtype,
        }

    def prepare(self, works: list[Work]) -> int:
        """Make ready to fit pictures of one latent size; the number of phases that remain."""
        self._works = works
        trajectories = [work.store.trajectory() for work in works]
        grid = tuple(trajectories[0].shape[-2:])
        self.place((grid[0], grid[1]), self.slots)
        record = self.tuning_record()
        done = [work.store.done() for work in works]
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

    def setup(self, stage: str) -> None:
        """A fit has as many epochs as phases remain."""
        if stage == "fit":
            self.trainer.fit_loop.max_epochs = 1 if self.trainer.fast_dev_run else len(self._plan)

    def configure_optimizers(self) -> Optimizer:
        """One optimiser for the live psi."""
        optimizer = self.optimizer(self.psi.parameters())
        if self.slots > 1 and _needs_closure(optimizer):
            raise UserError(
                f"{type(optimizer).__name__} would share its steps between the pictures side by side: use slots 1"
            )
        return optimizer

    def on_train_epoch_start(self) -> None:
        """A phase begins: z-tilde_t, its pivot, and where psi_t starts."""
        phase = self._phase = self._plan[self.current_epoch]
        batch, i = self._batches[phase.batch], phase.step
        assert self._attachment is not None
        self._attachment.check()
        if i == batch.first or self.current_epoch == 0:
            self._enter(batch)
        self._pivot = self._pivots[self.steps - i - 1]
        self._reset_psi(batch, i)
        optimizer = self._optimizer()
        optimizer.state.clear()
        stopped = torch.tensor([not active for active in batch.active])
        if not self.table.has_effect(i):
            stopped[:] = True
        self._keeper = SlotKeeper(self.psi.parameters(), self.slots, stopped)
        self._errors = torch.zeros(self.slots)
        self._used, self._begin_errors = torch.zeros(self.slots, dtype=torch.long), None

    def _enter(self, batch: Batch) -> None:
        """Take up a batch of pictures at the step where it goes on."""
        works = [self._works[m] for m in batch.members]
        trajectories = [work.store.trajectory().to(self.device) for work in works]
        self._pivots = torch.stack(trajectories, 1)
        before = [work.store.step(batch.first - 1) if batch.first else None for work in works]
        self._before = before
        self._z = torch.stack(
            [step.z.to(self.device) if step else z[-1] for step, z in zip(before, trajectories, strict=True)]
        )
        prompts = self.backbone.embed([self.negative] * len(works) + [work.source for work in works])
        self._contexts = prompts.unflatten(0, (2, -1))
        self._bind([work.store for work in works])
        names = works[0].name if self.slots == 1 else f"{sum(batch.active)} pictures"
        self.watch.begin("tuning", names, self.steps - batch.first)

    def _bind(self, stores: list[RunStore]) -> None:
        masks = []
        for store in stores:
            picture = store.read_run()["picture"]
            if picture["mask"]:
                mask = pictures.open_picture(store.folder / "mask.png").image
                masks.append(
                    pictures.to_mask(
                        mask, records.geometry_of({**picture, "size": list(mask.size), "box": None})
                    )
                )
        if masks and len(masks) < len(stores):
            raise UserError(
                "some of the pictures tuned side by side have a mask and some have none: tune them apart"
            )
        for cp in self.psi.values():
            assert isinstance(cp, CPAttention)
            if masks and type(cp).bind is CPAttention.bind:
                raise UserError(
                    f"a mask was given, but {type(cp).__name__} takes none: leave it out, or use a variant that does"
                )
            cp.bind(torch.stack(masks).to(self.device) if masks else None)

    @torch.no_grad()
    def _reset_psi(self, batch: Batch, i: int) -> None:
        """Psi_t at the start of its phase: psi_(t+1), or the variant's own start for (seed, picture, step)."""
        if self.carry and i > 0:
            if i == batch.first:  # otherwise the live psi is psi_(t+1), as it was stored
                for slot, step in enumerate(self._before):
                    self._read_psi(step, slot)
            return
        cps = [cp for cp in self.psi.values() if isinstance(cp, CPAttention)]
        for slot, member in enumerate(batch.members):
            digest = self._works[member].store.read_run()["picture"]["sha256"]
            for cp in cps:
                # one slot at a time, so that a start depends on nobody else in the batch
                alone = self.variant(Site(cp.site.path, 1, cp.site.grid, cp.site.dim, cp.site.heads))
                alone.reset(generator(self.seed, f"{digest} {cp.site.path}", i))
                for mine, its in zip(cp.parameters(), alone.parameters(), strict=True):
                    mine[slot] = its[0].to(mine.device)
        if any(cp.observes for cp in cps):
            assert self._attachment is not None
            with self._attachment.observing() as kv:
                t = self.table.timesteps[i].to(self.device).expand(self.slots)
                self._branches(self._z, t, self._contexts[1:])
            for cp in cps:
                k, v = kv[cp.site.path]
                cp.observe(k[-1].float(), v[-1].float())

    def _read_psi(self, step: Step | None, slot: int) -> None:
        assert step is not None
        for name, parameter in records.parameters_by_site(self.psi).items():
            parameter[slot] = step.psi[name].to(parameter.device, parameter.dtype)

    def _optimizer(self) -> Optimizer:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        return optimizer  # pyright: ignore[reportReturnType]

    def _reconstruct(self) -> Tensor:
        """z-tilde_{t-1} for every slot."""
        return reconstruct(
            self._guided_eps(self._contexts, self.tuning_guidance), self._z, self.table, self._phase.step
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """ "While not converged": the phase is over when every slot has stopped."""
        return -1 if self._keeper.all_stopped else None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One optimiser step of Eq. 3 for the slots that have not converged."""
        assert self._attachment is not None
        optimizer = self._optimizer()
        with self._attachment.blend():
            errors = squared_errors(self._pivot, self._reconstruct())
            self._check_finite(errors)
            means = (errors.detach() / self._pivot[0].numel()).cpu()
            self._begin_errors = means if self._begin_errors is None else self._begin_errors
            self._keeper.stop(self.convergence.reached(means, self._phase.step))
            self.watch.show(self._where(batch_idx, means))
            if self._keeper.all_stopped:
                return
            running = ~self._keeper.stopped
            self._used += running

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = squared_errors(self._pivot, self._reconstruct())[running.to(self.device)].sum()
                self.manual_backward(loss)
                return loss

            if _needs_closure(optimizer):
                optimizer.step(closure)
            else:
                optimizer.zero_grad()
                self.manual_backward(errors[running.to(self.device)].sum())
                optimizer.step()
        self._keeper.restore()

    def _check_finite(self, errors: Tensor) -> None:
        if not errors.isfinite().all():
            raise UserError(
                f"the reconstruction is no longer finite at step {self._phase.step}: use a lower learning rate "
                "or guidance scale, or precision 32-true"
            )

    def _where(self, inner: int, means: Tensor) -> str:
        t, loss = (
            int(self.table.timesteps[self._phase.step]),
            float(means[~self._keeper.stopped].mean())
            if not self._keeper.all_stopped
            else float(means.mean()),
        )
        return f"timestep {t}, inner step {inner}, loss {loss:.2e}"

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """A phase ends: round psi_t as it is stored, advance z-tilde with it, and write both."""
        assert self._attachment is not None
        batch, i, dtype = self._batches[self._phase.batch], self._phase.step, STORE_DTYPES[self.store_dtype]
        for parameter in self.psi.parameters():
            parameter.copy_(parameter.to(dtype).to(parameter.dtype))
        with self._attachment.recording() as kv:
            z = self._reconstruct()
        ends = (squared_errors(self._pivot, z) / z[0].numel()).cpu()
        self._check_finite(ends)
        begins = ends if self._begin_errors is None else self._begin_errors
        named = records.parameters_by_site(self.psi)
        for slot, (member, active) in enumerate(zip(batch.members, batch.active, strict=True)):
            if active and not self.trainer.fast_dev_run:
                self._works[member].store.save_step(
                    i,
                    {name: parameter[slot].to(dtype).cpu() for name, parameter in named.items()},
                    z[slot].cpu(),
                    {
                        path: (k[:, slot].to(dtype).cpu(), v[:, slot].to(dtype).cpu())
                        for path, (k, v) in kv.items()
                    },
                    {
                        "loss_start": float(begins[slot]),
                        "loss_end": float(ends[slot]),
                        "inner_steps": int(self._used[slot]),
                    },
                )
        self._z = z
        for slot, (member, active) in enumerate(zip(batch.members, batch.active, strict=True)):
            if active:
                shown = {
                    "loss_start": float(begins[slot]),
                    "loss": float(ends[slot]),
                    "inner_steps": float(self._used[slot]),
                }
                name = self._works[member].store.folder.name
                for logger in self.loggers:
                    logger.log_metrics({f"{name}/{key}": value for key, value in shown.items()}, step=i)
        self.watch.advance(f"loss {float(ends.mean()):.2e}")
        if i == self.steps - 1 and not self.trainer.fast_dev_run:
            for member, active in zip(batch.members, batch.active, strict=True):
                if active:
                    self._certify(self._works[member])

    def certify_rest(self, works: list[Work]) -> None:
        """What a fit that was stopped after its last phase has left undone."""
        for work in works:
            if "reconstruction" not in work.store.read_run():
                self._certify(work)

    def _certify(self, work: Work) -> None:
        """Decode the reconstruction and write what it is worth."""
        store, run = work.store, work.store.read_run()
        z_0, z_tuned = store.trajectory()[0], store.step(self.steps - 1).z
        round_trip, tuned = self.backbone.decode(torch.stack([z_0, z_tuned]).to(self.device)).cpu()
        geometry = records.geometry_of(run["picture"])
        picture = pictures.to_image(tuned, geometry)
        source = pictures.open_picture(store.folder / "source.png").image
        infos = [store.step_info(i) for i in range(self.steps)]
        figures = {
            "psnr_to_round_trip": round(records.psnr(tuned, round_trip), 2),
            "psnr_to_source": round(records.psnr(_pixels(picture), _pixels(source)), 2),
            "inner_steps": sum(info["inner_steps"] for info in infos),
            "phases": infos,
        }
        store.save_picture("reconstruction", picture)
        store.write_run({**run, "reconstruction": figures})
        self.watch.finish(f"reconstruction {figures['psnr_to_round_trip']:.1f} dB against the VAE round trip")

    # -------------------------------------------------------------------------------------------- stage 3: editing

    def is_tuned(self, work: Work) -> bool:
        """Whether every step has its psi."""
        return work.store.has_trajectory() and first_missing(work.store.done(), self.steps) == self.steps

    def _edit(self, work: Work) -> None:
        store = work.store
        if not self.is_inverted(work) or not self.is_tuned(work):
            raise UserError(f"{store.folder} is not tuned to the end: go on with `kvinv fit` before editing")
        run = store.read_run()
        began = time.perf_counter()
        trajectory = store.trajectory()
        attachment = self.place((trajectory.shape[-2], trajectory.shape[-1]), 1)
        now = self.tuning_record()
        store.require(
            {"tuning": {**run["tuning"], "attention": now["attention"], "sites": now["sites"]}}, ["tuning"]
        )
        self._bind([store])
        if self.guidance != run["tuning"]["guidance"]:
            self.watch.note(
                f"{work.name}: tuned at guidance {run['tuning']['guidance']:g}, edited at {self.guidance:g}"
            )
        targets = work.targets
        texts = [text for target in targets for text in (self.negative, target)]
        contexts = self.backbone.embed(texts)  # edit-major, then unconditional and conditional
        self.watch.begin("editing", work.name, self.steps)

        def eps(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            rows = z.repeat_interleave(2, 0)
            with self.trainer.precision_plugin.forward_context():
                out = self.backbone.eps(rows, t.repeat_interleave(2), contexts).unflatten(0, (-1, 2))
            return out[:, 0], out[:, 1]

        first = first_step(self.start, self.steps)
        with ThreadPoolExecutor(1) as pool:
            # one step of prefetch: the next psi_t is read while the network works
            coming = {first: pool.submit(store.step, first)} if first < self.steps else {}

            @contextmanager
            def psi(i: int) -> Iterator[None]:
                step = coming.pop(i).result()
                if i + 1 < self.steps:
                    coming[i + 1] = pool.submit(store.step, i + 1)
                if self.reading == "frozen":
                    if step.kv is None:
                        raise UserError(
                            f"{store.folder} holds no K-bar and V-bar: edit it with reading blend"
                        )
                    with attachment.frozen(
                        {path: (k[:, None], v[:, None]) for path, (k, v) in step.kv.items()}
                    ):
                        yield
                else:
                    self._read_psi(step, 0)
                    with attachment.blend():
                        yield

            z_T = trajectory[-1:].to(self.device).expand(len(targets), -1, -1, -1)
            z = edit(
                eps, z_T, self.table, psi, self.guidance, self.start,
                lambda i: self.watch.advance(f"timestep {int(self.table.timesteps[i])}"),
            )  # fmt: skip
        geometry = records.geometry_of(run["picture"])
        edits = [pictures.to_image(pixels.cpu(), geometry) for pixels in self.backbone.decode(z)]
        seconds = time.perf_counter() - began
        self.last_edits = [
            store.save_edit(target, picture, self.edit_record(run, target, seconds / len(targets)))
            for target, picture in zip(targets, edits, strict=True)
        ]
        store.save_picture("sheet", self._sheet(store))
        self.watch.finish()

    def _sheet(self, store: RunStore) -> Any:
        """The source, the reconstruction and every edit that lies in the run folder."""
        run = store.read_run()
        done = store.edits()
        files = [
            store.folder / "source.png",
            store.folder / "reconstruction.png",
            *[file for _, file in done],
        ]
        quality = run["reconstruction"]["psnr_to_round_trip"]
        captions = [f"source\n{run['source']}", f"reconstruction\n{quality:.1f} dB to the VAE round trip"]
        for record, _ in done:
            captions.append(
                f"{record['target']}\n{record['reading']}, start {record['start']:g}, guidance {record['guidance']:g}"
            )
        return sheet([pictures.open_picture(file).image for file in files], captions)

    def edit_record(self, run: dict[str, Any], target: str, seconds: float) -> dict[str, Any]:
        """What an edit depends on, and what it took."""
        return {
            "target": target,
            "source": run["source"],
            "negative": self.negative,
            "guidance": self.guidance,
            "tuned_at": run["tuning"]["guidance"],
            "reading": self.reading,
            "start": self.start,
            "picture": run["picture"]["sha256"],
            "model": run["model"]["sha256"],
            "figures": {"seconds": round(seconds, 2)},
        }


def _needs_closure(optimizer: Any) -> bool:
    """Whether the optimiser evaluates the loss itself, as L-BFGS does."""
    step = getattr(optimizer, "optimizer", optimizer).step
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _pixels(picture: Any) -> Tensor:
    """A PIL picture as pixels in -1 .. 1."""
    return pictures.to_pixels(picture, pictures.Geometry(picture.size, picture.size))
