"""KV Inversion as a LightningModule: a fit is a curriculum of phases, predict runs the other stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch.optim import Optimizer

from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.attention.mixing import Mixing
from kvinv_pl.attention.registry import resolve
from kvinv_pl.attention.sites import Selection, Site
from kvinv_pl.data.runs.tensors import StoreDtype
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.in_memory import Pipeline
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.models.fingerprint import ChangeTracker, pipeline_fingerprints
from kvinv_pl.models.load_options import LoadOptions, Prediction, Spacing
from kvinv_pl.models.stable_diffusion import Backbone
from kvinv_pl.models.text.prompt_syntax import PromptSyntax
from kvinv_pl.optimizers import Renewal, needs_closure, reads_residuals
from kvinv_pl.stages.curriculum import Curriculum, Pass
from kvinv_pl.stages.editing.edit import edit_picture
from kvinv_pl.stages.editing.search import Auto, Search, search_edits, without_auto
from kvinv_pl.stages.invert import invert_picture, is_inverted
from kvinv_pl.stages.progress import Observers
from kvinv_pl.stages.settings import (
    IDLE,
    Background,
    EditSettings,
    InversionSettings,
    KeyValues,
    Reading,
    TuningSettings,
    defaults_for,
)
from kvinv_pl.stages.tuning.certificate import Attempt
from kvinv_pl.stages.tuning.plan import Planner
from kvinv_pl.stages.tuning.tune import Tuning
from kvinv_pl.stages.validation import at_least_1, plain, require_kind
from kvinv_pl.training.datamodule import Job
from kvinv_pl.training.precision import overflows, precision_of


class KVInversion(LightningModule):
    """KV Inversion (arXiv 2309.16608) of pictures by a frozen Stable Diffusion model.

    Args:
        checkpoint: "menagerie" (the embedded model), a diffusers folder, a .safetensors file, or a hub id.
        variant: Which weights to load if a folder or hub id has several: fp16 or non_ema; default: the full
            ones, or the only ones there are.
        vae: Another VAE for the checkpoint: a .safetensors file, a folder or a hub id.
        prediction_type: What the U-Net predicts, if the checkpoint does not say so or is wrong.
        timestep_spacing: Where the steps lie in the noise schedule, as in diffusers' schedulers: leading
            (leaves out the noisiest timesteps, more of them with fewer steps), linspace or trailing (both
            begin at the noisiest timestep); default: the checkpoint's.
        clip_skip: The layer of the text model whose output is used, counted from the end as in web UIs: 1 is
            the last, 2 the last but one.
        loras: LoRAs to merge into the weights: files or hub ids, each as FILE:WEIGHT if its weight is not 1.
        embeddings: Textual inversions to add to the tokenizer: files or hub ids, each as WORD=FILE to use
            another word than the file's own.
        prompt_syntax: How prompts are read: plain (literally, no more tokens than the text model reads) or
            webui (of any length, with the weights of web UIs, such as (running:1.3) and [grass]).
        allow_pickle: Read the tensors of a pickled checkpoint (.ckpt), which is refused otherwise.
        attention: The CP-attn variant: a name that `kvinv variants` lists, or class_path and init_args;
            default: the paper's own, full_kv.
        target_modules: Which self-attentions carry psi: encoder, middle, decoder or all, or a regex or list
            of paths as in peft's LoraConfig.
        exclude_modules: Which of these to leave out, in the same form.
        layers_to_transform: Keep only the blocks with these indices, as in peft's LoraConfig.
        layers_pattern: The name of the module list whose indices layers_to_transform gives.
        max_grid: Only self-attentions of at most max_grid x max_grid tokens; default: any size.
        steps: Number of DDIM steps T, in all stages; for fewer than the default, use timestep_spacing
            trailing and at least 20: with 10, most edits miss the action.
        guidance: Guidance scale w of the edit, and of tuning unless that has its own; default: 3 for the
            embedded model, 7.5 for any other.
        source_guidance: Guidance scale w_s of the source prompt, in the edit and in tuning; w then scales
            only the change from source to target prompt: eps = eps(negative) + w_s (eps(source) -
            eps(negative)) + w (eps(target) - eps(source)). Default: 1 for the embedded model; for any other
            w, which is classifier-free guidance. At 1 the negative prompt is not used, and tuning runs only
            the source prompt's branch.
        inversion_guidance: Guidance scale of the inversion; at 1 only the source prompt is used.
        tuning_guidance: Guidance scale of tuning, with psi in both branches; at 1 only the source prompt's
            branch runs; default: source_guidance, or else guidance.
        optimizer: Any torch optimiser by class_path; its state is reset at every timestep.
        curriculum: sequential (the paper's): one timestep after the other is tuned as z-tilde rolls out.
            pivot: all timesteps are tuned at once, side by side in the slots, each at its pivot z-hat_t; then
            z-tilde rolls out, and every psi_t is tuned again for at most settle_steps.
        inner_steps: Maximum number of optimiser steps for one timestep.
        settle_steps: Maximum number of optimiser steps for one timestep in the roll-out of curriculum pivot.
        tolerance: Mean squared error of the latent at which the noisiest timestep has converged.
        tolerance_growth: How much the tolerance grows with every later step.
        carry: Initialize psi_t with psi_(t+1) rather than with the variant's own start. With curriculum
            pivot: apply what the roll-out has changed so far to the next timestep, rather than take each as
            tuned at its pivot.
        reading: What an edit reads: frozen (the K-bar and V-bar at which tuning arrived) or blend (Eq. 1
            applied to its own K and V).
        kv: Where reading frozen gets K-bar and V-bar: stored (on disk, with psi) or replayed (only psi is on
            disk, and the source runs beside the edits: n edits cost as much as n + 1).
        start: The share of an edit's steps, counted from noise, before CP-attn becomes active; auto: a
            search, which needs no ground truth, chooses it for each picture and target, and says what else
            was good (the same for guidance and sharpness).
        negative: The negative prompt.
        subject: The subject's word in the targets, for variants that follow it through an edit; default: the
            last word that source and target have in common before they differ.
        sharpness: Factor of the attention scores of Eq. 2 in an edit, with reading frozen; above 1, each
            query attends to fewer of the source's keys.
        mixing: What an edit attends to, with reading frozen: replace (only K-bar and V-bar) or concat (its
            own keys and values together with them).
        background: free (the whole picture is rendered) or kept (where neither the source nor the edit has
            the subject, the source's latents are restored after every step except in the first fifth).
        ahead: By what share of the steps K-bar and V-bar are ahead of the edit, with reading frozen: each
            step reads those of a later timestep, which show more of the source. Default: 0.7 for the
            embedded model, 0 for any other.
        reading_guidance: Guidance scale w_r of what is read from the source, with reading frozen: eps +
            (w_r - 1) (eps(target) - eps(target alone)), where the last one attends only to itself, in a
            forward pass of its own. Above 1 an edit shows more clearly what it reads, thin and small things
            above all. Default: 2 for the embedded model; 1 for any other, without that forward pass.
        candidates: How many edits of each target to show in candidates.png, the most promising first; with
            more than 1 and nothing auto, the start is searched.
        judge: The CLIP folder that judges the edits of a search, or menagerie, the embedded world's CLIP;
            default: the model itself, by which prompt predicts an edit's noise better.
        seed: Seed of psi's random start.
        slots: How many pictures of one size (or timesteps of curriculum pivot) are tuned side by side; auto:
            as many as fit into memory, at most 8.
        store_dtype: The type in which psi, K-bar and V-bar are stored on disk; int8 has a scale per channel.
        required_psnr: PSNR in dB, against the VAE round trip, that a reconstruction must reach to pass.
        retries: How often to tune a picture again that does not pass, each time with twice the inner (and
            settle) steps and another random start; the best attempt is kept.
    """

    def __init__(
        self,
        checkpoint: str = "menagerie",
        variant: str | None = None,
        vae: str | None = None,
        prediction_type: Prediction | None = None,
        timestep_spacing: Spacing | None = None,
        clip_skip: int = 1,
        loras: str | list[str] | None = None,
        embeddings: str | list[str] | None = None,
        prompt_syntax: PromptSyntax = "plain",
        allow_pickle: bool = False,
        attention: Callable[[Site], CPAttention] | None = None,
        target_modules: str | list[str] = "decoder",
        exclude_modules: str | list[str] | None = None,
        layers_to_transform: int | list[int] | None = None,
        layers_pattern: str | list[str] | None = None,
        max_grid: int | None = None,
        steps: int = 50,
        guidance: float | Auto | None = None,
        source_guidance: float | None = None,
        inversion_guidance: float = 1.0,
        tuning_guidance: float | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.Adam(p, lr=3e-2),
        curriculum: Curriculum = "sequential",
        inner_steps: int = 3,
        settle_steps: int = 1,
        tolerance: float = 1e-5,
        tolerance_growth: float = 2e-5,
        carry: bool = True,
        reading: Reading = "frozen",
        kv: KeyValues = "stored",
        start: float | Auto = 0.0,
        negative: str = "",
        subject: str | None = None,
        sharpness: float | Auto = 1.0,
        mixing: Mixing = "replace",
        background: Background = "free",
        ahead: float | None = None,
        reading_guidance: float | None = None,
        candidates: int = 1,
        judge: str | None = None,
        seed: int = 0,
        slots: int | Literal["auto"] = "auto",
        store_dtype: StoreDtype = "int8",
        required_psnr: float = 35.0,
        retries: int = 1,
    ):
        """Save the settings; the checkpoint is loaded when a stage begins, in the trainer's precision."""
        arguments = {**locals()}
        options = without_auto(arguments)
        defaults = IDLE | defaults_for(checkpoint)
        options |= {name: value for name, value in defaults.items() if options[name] is None}
        super().__init__()
        self.search = Search.of(arguments)
        self.chosen_defaults = {
            name: value for name, value in defaults_for(checkpoint).items() if arguments[name] is None
        }
        self.automatic_optimization = False
        self.checkpoint, self.variant, self.optimizer = checkpoint, attention or resolve("full_kv"), optimizer
        self.selection = Selection(
            target_modules, exclude_modules, layers_to_transform, layers_pattern, plain(max_grid)
        )
        self.editing, self.inverting = EditSettings.of(options), InversionSettings.of(options)
        self.tuning = TuningSettings.of(options)
        self.load_options = LoadOptions.from_parameters({**options, "clip_skip": plain(clip_skip)})
        self.steps, self.slots = plain(steps), plain(slots)
        counts = {"steps": steps, "slots": 1 if slots == "auto" else slots, "clip_skip": clip_skip}
        for name, count in counts.items():
            require_kind(name, plain(count), int)
            at_least_1(name, count)
        self.pipeline: Pipeline | None = None  # in place of the checkpoint, from Python
        self.last_edits: list[Path] = []
        self._network: Denoiser | None = None
        self._changes: ChangeTracker | None = None
        self._loaded: object = None

    # ---- the frozen model, once

    @property
    def denoiser(self) -> Denoiser:
        """The model with psi attached; load_backbone() makes it."""
        if self._network is None:
            raise RuntimeError("load_backbone() comes first: the checkpoint is not loaded")
        return self._network

    def load_backbone(self, dtype: torch.dtype) -> Backbone:
        """Load the checkpoint, unless it is loaded; the U-Net and the text model are loaded in `dtype`.

        A pipeline in memory that was changed since is copied anew; a change of the loaded model itself
        becomes part of its identity.
        """
        inside = None if self.pipeline is None else pipeline_fingerprints(self.pipeline)
        wanted = (self.checkpoint, self.load_options, dtype, inside)
        if self._loaded != wanted:
            self._network = self._changes = self._loaded = None  # two would not always fit
            backbone = Backbone.load(self.pipeline or self.checkpoint, dtype, self.load_options)
            self._network = Denoiser(backbone, self.variant, self.selection, self.steps)
            self._changes, self._loaded = ChangeTracker(backbone), wanted
        elif self._changes is not None and self._changes.update_identity():
            self.denoiser.release()  # psi is attached to the layers that there are now
        return self.denoiser.backbone

    def setup(self, stage: str) -> None:
        """Run every forward in the trainer's precision; a fit has as many epochs as phases remain."""
        self.denoiser.autocast = self.trainer.precision_plugin.forward_context
        if stage == "fit":
            self.trainer.fit_loop.max_epochs = 1 if self._dry_run else len(self._fit.plan)

    @property
    def _dry_run(self) -> bool:
        """Whether this is the trainer's fast_dev_run: one inner step of one phase."""
        return bool(getattr(self.trainer, "fast_dev_run", False))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave jobs and step numbers where they are."""
        return batch

    # ---- stages 1 and 3

    def predict_step(self, batch: Job, batch_idx: int) -> None:
        """One stage of one picture."""
        image, settings, observers = batch.image, batch.settings, batch.observers
        # what is written here is read by the tuning, where inference tensors would not do
        with torch.inference_mode(False), observers.failures.catching([image]):
            if isinstance(settings, EditSettings) and self.search.is_active:
                self.last_edits = search_edits(
                    self.denoiser, image, settings, self.search, observers, batch.overwrite
                )
            elif isinstance(settings, EditSettings):
                edited = edit_picture(self.denoiser, image, settings, observers, batch.overwrite)
                self.last_edits = edited.paths
            elif not is_inverted(self.denoiser, image, settings):
                invert_picture(self.denoiser, image, settings, observers)

    # ---- stage 2: the fit, whose epochs are phases

    def tuning_record(self) -> dict[str, Any]:
        """What psi depends on, besides the trajectory."""
        return self.tuning.record(self.denoiser.cps, self.selection.max_grid, self.configure_optimizers())

    def passes(self, images: list[SourceImage], slots: int, observers: Observers) -> tuple[Pass, ...]:
        """The passes over the timesteps of these pictures, of one latent size, in order."""
        return self._planner(images, slots, observers).passes()

    def prepare(
        self, images: list[SourceImage], slots: int, observers: Observers, attempt: int, which: Pass
    ) -> Tuning:
        """Prepare a pass over pictures of one latent size; its plan has the phases that remain."""
        current = Attempt(attempt, self.tuning)
        planner = self._planner(images, slots, observers)
        precision = precision_of(self.denoiser.backbone.unet.dtype)
        editing = {**self.editing.for_run(), "precision": precision}
        attempt_images, plan = planner.plan(current, which, self.tuning_record, editing)
        self._fit = Tuning(self.denoiser, current, which, attempt_images, plan, observers)
        return self._fit

    def _planner(self, images: list[SourceImage], slots: int, observers: Observers) -> Planner:
        return Planner(self.denoiser, self.tuning, images, slots, observers.failures)

    def configure_optimizers(self) -> Optimizer | None:
        """One optimiser for the live psi; none for a variant that learns nothing."""
        parameters = list(self.denoiser.psi.parameters())
        if not parameters:
            return None
        try:
            optimizer = self.optimizer(parameters)
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer: {error}; give it arguments that it takes") from error
        slots = self.denoiser.cps[0].site.slots
        if slots > 1 and needs_closure(optimizer) and not reads_residuals(optimizer):
            kind = type(optimizer).__name__
            raise UserError(f"{kind} would share its steps between pictures side by side: use slots 1")
        return optimizer

    def on_train_start(self) -> None:
        """Save the optimiser's initial settings, for every phase to begin with."""
        self._renewal = Renewal(self.optimizers())

    def on_train_epoch_start(self) -> None:
        """A phase begins, as if it were the only one."""
        self._fit.begin(self.current_epoch)
        self._renewal.renew(self.optimizers())
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # loss scaling (16-mixed) starts anew, too
            self.trainer.precision_plugin.scaler = type(scaler)(self.device.type)  # pyright: ignore[reportAttributeAccessIssue]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """While not converged: the phase is over when every slot has stopped."""
        return -1 if self._fit.converged else None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One optimiser step of Eq. 3 for the slots that have not converged."""
        overflowed = overflows(self.trainer.precision_plugin)
        self._fit.step(batch_idx, self.optimizers(), self.manual_backward, overflowed)

    def on_train_epoch_end(self) -> None:
        """A phase ends: write its results."""
        self._fit.end(dry_run=self._dry_run)
