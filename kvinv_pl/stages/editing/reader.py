"""What an edit reads at each step: psi_t itself, or the K-bar and V-bar of the source, stored or replayed."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor, cat

from kvinv_pl.algorithm.editing import branches_at, first_step
from kvinv_pl.attention.attachment import Attachment
from kvinv_pl.attention.cross_attention import AttentionMaps, cross_attentions, recording_maps
from kvinv_pl.attention.unet import in_decoder
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.data.runs.tensors import Step
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.models.prompts import START, subject_positions, subject_words
from kvinv_pl.models.text.prompt_reader import as_long
from kvinv_pl.stages.editing.background import blend_background, source_subject
from kvinv_pl.stages.settings import EditSettings


@dataclass(eq=False)
class Source:
    """The source's rows in a forward with its edits: its prompts, its latent and the timestep of that."""

    contexts: Float[Tensor, "branches L d"]
    z: Float[Tensor, "1 c h w"] | None = None
    t: Int[Tensor, ""] | None = None


PREFETCHED = 2
"""Steps that are read while the network runs."""
UNSETTLED = 0.2
"""The share of the steps, from noise, in which attention maps do not show yet where the subject will be."""


class Reader:
    """The network under the target prompts with what was tuned; steps are prefetched."""

    def __init__(
        self, denoiser: Denoiser, store: RunStore, targets: Sequence[str], settings: EditSettings
    ) -> None:
        """Embed the prompts, one edit for each target; the run is tuned to the end, psi one slot wide."""
        self.denoiser, self.store, self.settings = denoiser, store, settings
        self.first = first_step(settings.start, len(denoiser.table))
        frozen, negative = settings.reading == "frozen", settings.negative
        self.branches = settings.guide.branches
        run = store.read_run()
        tuning, source = run["tuning"], run["source"]
        # of K-bar and V-bar, tuning has the source's branch last, behind the negative prompt's if it ran that
        tuned = [tuning["negative"], source][-branches_at(tuning["guidance"]) :]
        self.kv_rows = [0 if branch == "negative" else len(tuned) - 1 for branch in self.branches]
        # rows of the U-Net: edit after edit, each with all of its branches
        prompts = [{"negative": negative, "source": source, "target": target} for target in targets]
        self.contexts = denoiser.backbone.embed(
            [texts[branch] for texts in prompts for branch in self.branches]
        )
        self.source: Source | None = None
        if frozen and settings.kv == "replayed":
            self.source, self._trajectory = Source(denoiser.backbone.embed(tuned)), store.trajectory()
        self._prefetched: dict[int, Future[Step]] = {}
        self._positions: list[list[int]] | None = None  # of each row; only the targets' have any
        follows, keeps = frozen and any(cp.follows for cp in denoiser.cps), settings.background == "kept"
        self._in_source: Bool[Tensor, "1 1 h w"] | None = None
        self._source_z: Float[Tensor, "1 c h w"] | None = None
        if keeps:
            words = subject_words(denoiser.backbone, source, targets, settings.subject)
            self._in_source = source_subject(denoiser, store, source, words[0])
        if follows or keeps:
            found = subject_positions(denoiser.backbone, source, targets, settings.subject)
            others: list[list[int]] = [[]] * (len(self.branches) - 1)
            self._positions = [positions for each in found for positions in (*others, each)]
        self._at = self.first
        self._open = ExitStack()
        self._maps: AttentionMaps | None = None

    @property
    def _extra(self) -> int:
        """The rows of the source, which are before those of the edits."""
        return 0 if self.source is None else len(self.source.contexts)

    def _record_maps(self, positions: list[list[int]]) -> None:
        """Record the edits' attention maps to the subject's word, from here on."""
        unet, rows = self.denoiser.backbone.unet, [[]] * self._extra + positions
        # the decoder's maps are the best, see prompts.mask_from_word
        recording = recording_maps(unet, rows, START, in_decoder(cross_attentions(unet)))
        self._maps = self._open.enter_context(recording)

    def _subject_map(self, grid: tuple[int, int]) -> Float[Tensor, "branches 1 h w"] | None:
        """Attention maps of the edits to the word: the mean of this forward so far and of those before.

        None until they are recorded and settled.
        """
        if self._maps is None or self._at < math.ceil(UNSETTLED * len(self.denoiser.table)):
            return None
        known = [found for found in (self._maps.current(grid), self._maps.average(grid)) if found is not None]
        if not known:  # the very first
            return None
        # only the rows of the targets have the word; their maps serve the other branches, too
        count = len(self.branches)
        targets = (sum(known[1:], known[0]) / len(known))[self._extra :][count - 1 :: count]
        seen = targets.repeat_interleave(count, 0)
        least, most = seen.amin((1, 2), keepdim=True), seen.amax((1, 2), keepdim=True)
        return ((seen - least) / (most - least).clamp_min(1e-12))[:, None]

    def restore_background(self, i: int, z: Float[Tensor, "edits c h w"]) -> Float[Tensor, "edits c h w"]:
        """The latents after step i, with the source's background where the settings ask for it."""
        if self._in_source is None or i < self.first or self._source_z is None:
            return z
        in_edit = self._subject_map((z.shape[-2], z.shape[-1]))
        if in_edit is None:
            return z
        each = in_edit[len(self.branches) - 1 :: len(self.branches)]
        return blend_background(z, self._source_z, self._in_source, each)

    def eps(self, z: Float[Tensor, "edits c h w"], t: Tensor) -> Float[Tensor, "branches edits c h w"]:
        """The output of every branch of every edit."""
        count, extra = len(self.branches), 0
        rows, times, contexts = z.repeat_interleave(count, 0), t.repeat_interleave(count), self.contexts
        if self.source is not None and self.source.z is not None and self.source.t is not None:
            extra = len(self.source.contexts)
            rows = cat([self.source.z.expand(extra, -1, -1, -1), rows])
            times = cat([self.source.t.to(t).expand(extra), times])
            contexts = cat(as_long([self.source.contexts, contexts]))
        with self.denoiser.autocast():
            eps = self.denoiser.backbone.predict(rows, times, contexts)[extra:]
        return eps.unflatten(0, (-1, count)).transpose(0, 1)

    def eps_alone(self, z: Float[Tensor, "edits c h w"], t: Tensor) -> Float[Tensor, "edits c h w"]:
        """The output of the target branch of every edit, which attends to itself outside `psi`."""
        contexts = self.contexts[len(self.branches) - 1 :: len(self.branches)]
        unseen = self._maps.paused() if self._maps else nullcontext()
        with self.denoiser.autocast(), unseen:
            return self.denoiser.backbone.predict(z, t, contexts)

    @contextmanager
    def prefetching(self) -> Iterator[None]:
        """Prefetch: the next steps are read while the network runs."""
        self._attachment = self.denoiser.attached()
        with ThreadPoolExecutor(PREFETCHED) as pool:  # to hash is most of it, and releases the GIL
            self._pool, settings = pool, self.settings
            self._prefetch(self.first)
            editing = self._attachment.editing(settings.sharpness, settings.mixing, self._subject_map)
            with self._open, editing:
                yield

    def _prefetch(self, first: int) -> None:
        """Begin to read this step and those after it that may be read ahead."""
        pinned = self.denoiser.device.type == "cuda"
        for i in range(first, min(first + PREFETCHED, len(self.denoiser.table))):
            if (read := self._read_at(i)) not in self._prefetched:
                self._prefetched[read] = self._pool.submit(self.store.step, read, pinned)

    def _read_at(self, i: int) -> int:
        """The step whose K-bar and V-bar step i reads."""
        steps = len(self.denoiser.table)
        ahead = self.settings.ahead if self.settings.reading == "frozen" else 0
        return min(i + round(ahead * steps), steps - 1)

    @contextmanager
    def psi(self, i: int) -> Iterator[None]:
        """The context in which the network reads what was tuned for step i; one step comes after another."""
        read = self._read_at(i)
        step = self._prefetched[read].result().on(self.denoiser.device)
        if i + 1 == len(self.denoiser.table) or self._read_at(i + 1) != read:
            del self._prefetched[read]
        self._prefetch(i + 1)
        self._at, attachment = i, self._attachment
        if self._in_source is not None:
            source_step = step if read == i else self.store.step(i).on(self.denoiser.device)
            self._source_z = source_step.z[None]
        if i == self.first and self._positions is not None:
            self._record_maps(self._positions)
        if self.settings.reading == "frozen" and self.source is None:
            mode = attachment.frozen(self._stored(step))
        else:
            self.denoiser.read(step.psi, slot=0)
            source = self.source
            mode = attachment.blend() if source is None else self._replayed(source, i, step, attachment)
        with mode:
            yield

    def _stored(self, step: Step) -> dict[str, tuple[Tensor, Tensor]]:
        kv = step.kv or {}
        return {path: (k[self.kv_rows, None], v[self.kv_rows, None]) for path, (k, v) in kv.items()}

    @contextmanager
    def _replayed(self, source: Source, i: int, step: Step, attachment: Attachment) -> Iterator[None]:
        """Run the source's rows along, from the latent at which these K-bar and V-bar were recorded."""
        read, table = self._read_at(i), self.denoiser.table
        source.t = table.timesteps[read]
        if read == 0 or self.denoiser.at_pivot:
            source.z = self._trajectory[len(table) - read][None].to(self.denoiser.device)
        elif i == self.first:
            source.z = self.store.step(read - 1).z[None].to(self.denoiser.device)
        with attachment.replaying(len(source.contexts), self.kv_rows):
            yield
        if self._read_at(i + 1) != read:
            source.z = step.z[None]  # z-tilde of the next step
