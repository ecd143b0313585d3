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
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.data.tensors import StoreDtype
from kvinv_pl.errors import UserError
from kvinv_pl.models.changes import Changes, of_pipeline
from kvinv_pl.models.choices import Choices, Prediction, Spacing
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.models.in_memory import Pipeline
from kvinv_pl.models.prompt_syntax import PromptSyntax
from kvinv_pl.models.stable_diffusion import Backbone
from kvinv_pl.optimizers import Renewal, needs_closure, reads_residuals
from kvinv_pl.stages.certificate import Attempt
from kvinv_pl.stages.curriculum import Curriculum, Pass
from kvinv_pl.stages.edit import edit_picture
from kvinv_pl.stages.invert import invert_picture, is_inverted
from kvinv_pl.stages.kinds import plain, require_kind
from kvinv_pl.stages.plan import Planner
from kvinv_pl.stages.progress import Watch
from kvinv_pl.stages.search import Auto, Search, search_edits, settled
from kvinv_pl.stages.settings import (
    IDLE,
    Background,
    EditSettings,
    InversionSettings,
    KeyValues,
    Reading,
    TuningSettings,
    at_least_1,
    defaults_for,
)
from kvinv_pl.stages.tune import Tuning
from kvinv_pl.training.datamodule import Job
from kvinv_pl.training.precision import overflows, precision_of


class KVInversion(LightningModule):
    """KV Inversion (arXiv 2309.16608) of pictures by a frozen Stable Diffusion model.

    Args:
        checkpoint: "menagerie" (the embedded model), a folder as diffusers saves it, a .safetensors file, or
            a hub id.
        variant: fp16 or non_ema: which weights are taken where a folder or a hub id has several; left out,
            the full ones, or those that there are.
        vae: Another VAE for the checkpoint: a .safetensors file, a folder or a hub id.
        prediction_type: What the U-Net predicts, where the checkpoint does not say it or is wrong.
        timestep_spacing: Where the steps lie in the noise schedule, in the words of diffusers: leading (the
            noisiest timesteps are left out, more of them with fewer steps), linspace or trailing (from the
            noisiest timestep on); left out, as the checkpoint says.
        clip_skip: The layer of the text model whose reading is taken, from its end, as web UIs count: 1 is
            the last, 2 the last but one.
        loras: LoRAs to merge into the weights: files or hub ids, each with a weight as FILE:WEIGHT if it is
            not 1.
        embeddings: Textual inversions to add to the tokenizer: files or hub ids, with another word than the
            file's own as WORD=FILE.
        prompt_syntax: How prompts are read: plain (as they are, to the text model's end) or webui (of any
            length, with weights as in (running:1.3) and [grass], as web UIs have them).
        allow_pickle: Read tensors from a checkpoint that is pickled (.ckpt) rather than refuse it.
        attention: The CP-attn variant, by a name that `kvinv variants` lists or by class_path and init_args;
            left out, it is the paper's own, full_kv.
        target_modules: Which self-attentions carry psi: encoder, middle, decoder, all, or as in peft.
        exclude_modules: What to leave out of them, in the same words.
        layers_to_transform: Numbers of the blocks to keep, as in peft.
        layers_pattern: The module list that layers_to_transform counts.
        max_grid: Only self-attentions of at most max_grid x max_grid tokens; left out, of any size.
        steps: DDIM steps T, in all stages; with few, such as 10, most edits miss the action: 20 at least,
                with timestep_spacing trailing.
        guidance: Guidance scale w of the edit, and of tuning unless another is given; left out, 3 for the
            embedded model and 7.5 for any other.
        source_guidance: Guidance scale w_s of what the source prompt says, in the edit and in tuning; w then
            guides the change of words alone: eps = eps(negative) + w_s (eps(source) - eps(negative)) +
            w (eps(target) - eps(source)). Left out, 1 for the embedded model, and for any other w, which
            is classifier-free guidance. At 1 the negative prompt has no branch, and tuning runs one alone.
        inversion_guidance: w of the inversion; 1 is the source prompt alone.
        tuning_guidance: w of tuning, with psi in both branches; 1 is the source prompt's branch alone; left
            out, source_guidance or else guidance.
        optimizer: Any torch optimiser by class_path; its state is cleared at every timestep.
        curriculum: sequential (the paper's): timestep after timestep is tuned as z-tilde
            rolls out. pivot: all timesteps are tuned at once, side by side in the slots, each at its pivot
            z-hat_t; then z-tilde rolls out, and every psi_t settles there in settle_steps at most.
        inner_steps: Optimiser steps for one timestep at most.
        settle_steps: With the curriculum pivot, optimiser steps for one timestep at most in rolling out.
        tolerance: Mean squared error of the latent at which the noisiest timestep has converged.
        tolerance_growth: What is added to the tolerance at every later step.
        carry: Start psi_t from psi_(t+1), rather than every timestep from the variant's own start. With the
            curriculum pivot: roll out with what settling has changed so far, rather than from each timestep
            as tuned at its pivot.
        reading: What an edit reads: frozen (the K-bar, V-bar tuning arrived at) or blend (Eq. 1 on its own).
        kv: Where frozen has K-bar, V-bar from: stored (on disk, with psi) or replayed (psi alone is on disk,
            and the source's pass runs along with the edits: n edits cost as n + 1).
        start: The share of the steps, counted from noise, that an edit makes before CP-attn becomes active;
            auto: a search without a truth chooses it for each picture and target, and says what else was
            good (guidance and sharpness likewise).
        negative: The negative prompt, of the unconditional branch.
        subject: The word for the subject in the targets, for variants that follow it through an edit; left
            out, it is the last word that source and target have in common before they differ.
        sharpness: Factor of the scores of Eq. 2 in an edit with the reading frozen; above 1 an edit's query
            keeps to the keys of K-bar that are most like it.
        mixing: What an edit reads, with the reading frozen: replace (K-bar and V-bar alone) or concat (its
            own keys and values side by side with them).
        background: free (the whole picture is rendered anew) or kept (latents that belong to the subject
            neither in the source nor in the edit are the source's, from a fifth of the steps on).
        ahead: By which share of the steps K-bar and V-bar are ahead of the edit, with the reading frozen: it
            reads those of a later timestep, in which more of the source is seen. Left out, 0.7 for the
            embedded model, and 0 for any other.
        reading_guidance: Guidance scale w_r of what is read of the source, with the reading frozen: eps +
            (w_r - 1) (eps(target) - eps(target alone)), where the last one attends to itself, in a forward
            of its own. Above 1 an edit shows more clearly what it reads, thin and small things above all.
            Left out, 2 for the embedded model, and 1 for any other, at which that forward does not run.
        candidates: How many edits of each target to show beside one another, the most promising first, in
            candidates.png; with more than 1 and nothing auto, the start is searched.
        judge: A CLIP folder that judges what is searched, or menagerie, the CLIP of the embedded world; left
            out, the model itself does, by which prompt predicts an edit's noise better.
        seed: Of random starts of psi.
        slots: How many pictures of one size (or timesteps, at their pivots) are tuned side by side; auto:
            what fits into memory, 8 at most.
        store_dtype: In which psi, K-bar and V-bar are kept on disk; int8 has a scale for each channel.
        required_psnr: dB to the VAE round trip that a reconstruction must reach for its picture to pass.
        retries: How often to tune a picture again that does not pass, each time with twice the inner (and
            settle) steps and other random starts; the best attempt is kept.
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
        asked = {**locals()}
        given = settled(asked)
        chosen = {name: value for name, value in defaults_for(checkpoint).items() if given[name] is None}
        given |= {name: value for name, value in IDLE.items() if given[name] is None} | chosen
        super().__init__()
        self.searching = Search.of(asked)
        self.chosen = {name: value for name, value in chosen.items() if asked[name] is None}
        self.automatic_optimization = False
        self.checkpoint, self.variant, self.optimizer = checkpoint, attention or resolve("full_kv"), optimizer
        self.selection = Selection(
            target_modules, exclude_modules, layers_to_transform, layers_pattern, plain(max_grid)
        )
        self.editing, self.inverting = EditSettings.of(given), InversionSettings.of(given)
        self.tuning = TuningSettings.of(given)
        self.choices = Choices.of({**given, "clip_skip": plain(clip_skip)})
        self.steps, self.slots = plain(steps), plain(slots)
        counts = {"steps": steps, "slots": 1 if slots == "auto" else slots, "clip_skip": clip_skip}
        for name, count in counts.items():
            require_kind(name, plain(count), int)
            at_least_1(name, count)
        self.pipeline: Pipeline | None = None  # in place of the checkpoint, from Python
        self.last_edits: list[Path] = []
        self._network: Denoiser | None = None
        self._changes: Changes | None = None
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
        inside = None if self.pipeline is None else of_pipeline(self.pipeline)
        wanted = (self.checkpoint, self.choices, dtype, inside)
        if self._loaded != wanted:
            self._network = self._changes = self._loaded = None  # two would not always fit
            backbone = Backbone.load(self.pipeline or self.checkpoint, dtype, self.choices)
            self._network = Denoiser(backbone, self.variant, self.selection, self.steps)
            self._changes, self._loaded = Changes(backbone), wanted
        elif self._changes is not None and self._changes.take():
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
        image, settings, watch = batch.image, batch.settings, batch.watch
        # what is written here is read by the tuning, where inference tensors would not do
        with torch.inference_mode(False), watch.failures.of([image]):
            if isinstance(settings, EditSettings) and self.searching.searches:
                self.last_edits = search_edits(
                    self.denoiser, image, settings, self.searching, watch, batch.again
                )
            elif isinstance(settings, EditSettings):
                self.last_edits = edit_picture(self.denoiser, image, settings, watch, batch.again)
            elif not is_inverted(self.denoiser, image, settings):
                invert_picture(self.denoiser, image, settings, watch)

    # ---- stage 2: the fit, whose epochs are phases

    def tuning_record(self) -> dict[str, Any]:
        """What psi depends on, besides the trajectory."""
        return self.tuning.record(self.denoiser.cps, self.selection.max_grid, self.configure_optimizers())

    def passes(self, works: list[SourceImage], slots: int, watch: Watch) -> tuple[Pass, ...]:
        """The passes over the timesteps of these pictures, of one latent size, in order."""
        return self._planner(works, slots, watch).passes()

    def prepare(
        self,
        works: list[SourceImage],
        slots: int,
        watch: Watch,
        attempt: int = 0,
        which: Pass = "roll-out",
    ) -> Tuning:
        """Prepare a pass over pictures of one latent size; its plan has the phases that remain."""
        current = Attempt(attempt, self.tuning)
        planner = self._planner(works, slots, watch)
        precision = precision_of(self.denoiser.backbone.unet.dtype)
        editing = {**self.editing.for_run(), "precision": precision}
        taken, plan = planner.plan(current, which, self.tuning_record, editing)
        self._fit = Tuning(self.denoiser, current, which, taken, plan, watch)
        return self._fit

    def _planner(self, works: list[SourceImage], slots: int, watch: Watch) -> Planner:
        return Planner(self.denoiser, self.tuning, works, slots, watch.failures)

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
