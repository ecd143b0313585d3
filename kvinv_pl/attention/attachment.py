"""Attaches CP-attn to a U-Net's self-attentions and detaches it, and sets what they compute in between."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.attention.mixing import Mixing, with_own
from kvinv_pl.attention.processor import (
    KV,
    PLAIN,
    CPProcessor,
    Mode,
    Project,
    Sdpa,
    attention_layer,
    expand_to_edits,
)
from kvinv_pl.attention.sites import Site
from kvinv_pl.errors import UserError

SubjectMap = Callable[[tuple[int, int]], Float[Tensor, "branches slots h w"] | None]
"""subject_map(grid): attention maps of the edits' rows to the subject's word, see CPAttention.attend_edit."""


class Attachment:
    """CP-attn in a U-Net. Outside a mode (`blend`, `frozen`, `replaying`, ...) the U-Net is unchanged.

    With gradient checkpointing, call `backward` inside the same context as the forward, which it repeats.
    """

    def __init__(self, unet: nn.Module, psi: Mapping[str, CPAttention]):
        self.unet, self.psi = unet, dict(psi)
        self._layers = layers = {path: attention_layer(unet, path, "CP-attn") for path in psi}
        for path, layer in layers.items():
            site = psi[path].site
            if (site.path, site.dim, site.heads) != (path, layer.inner_kv_dim, layer.heads):
                raise UserError(
                    f"{site} does not fit {path}, which has dim={layer.inner_kv_dim} and "
                    f"heads={layer.heads}: make the variant for the sites of this U-Net"
                )
        self._processors = {path: CPProcessor(cp.site, layers[path].processor) for path, cp in psi.items()}
        self._attached = True
        self._subject_map: SubjectMap | None = None
        self._sharpness = 1.0
        self._mixing: Mixing = "replace"
        for path, processor in self._processors.items():
            layers[path].set_processor(processor)  # pyright: ignore[reportArgumentType]

    def check(self) -> None:
        """Check that every processor is still ours; diffusers replaces processors silently."""
        if not self._attached:
            raise UserError("CP-attn has been detached from this U-Net: attach it again")
        lost = [(path, cause) for path in self._processors if (cause := self._lost(path))]
        if lost:
            raise UserError(
                f"CP-attn was replaced in {len(lost)} of its {len(self._processors)} self-attentions: at "
                f"{lost[0][0]} {lost[0][1]}. Do that before CP-attn is attached, or undo it and attach again"
            )

    def _lost(self, path: str) -> str | None:
        """What is there in place of our processor, and what may have put it there."""
        try:
            layer = self.unet.get_submodule(path)
        except AttributeError:
            return "the layer is no longer in the U-Net"
        if layer is not self._layers[path]:
            return f"the layer was replaced by a {type(layer).__name__}, as adapters and quantisation do"
        found = self._layers[path].processor
        if found is self._processors[path]:
            return None
        cause = PLAIN.get(type(found), "set_attn_processor or an adapter with processors of its own")
        return f"{type(found).__name__} is there instead, as after {cause}"

    def detach(self) -> None:
        """Restore the original processors; one that was replaced since is left alone."""
        self._attached = False
        for path, processor in self._processors.items():
            processor.mode = None
            if self._layers[path].processor is processor:
                self._layers[path].set_processor(processor.original)

    @contextmanager
    def blend(self, record: bool = False) -> Iterator[dict[str, KV]]:
        """Eq. 1 with the live psi; with `record` the dictionary gets the K-bar and V-bar used, detached."""
        recorded: dict[str, KV] = {}

        def mode(site: Site, q: Tensor, project: Project, sdpa: Sdpa) -> Tensor:
            k_bar, v_bar = self._bars(site, q, *project())
            if record:
                recorded[site.path] = k_bar.detach(), v_bar.detach()
            return self._attend(site, q, (k_bar, v_bar), sdpa)

        with self._in(mode):
            yield recorded

    @contextmanager
    def frozen(self, kv: Mapping[str, KV]) -> Iterator[None]:
        """K-bar and V-bar are given: (1 or an edit's branches, slots, tokens, dim), for any edits."""
        missing, unknown = sorted(self.psi.keys() - kv.keys()), sorted(kv.keys() - self.psi.keys())
        if missing or unknown:
            raise UserError(
                "expected K-bar and V-bar for exactly the self-attentions that CP-attn is attached to; "
                f"missing: {missing}, not attached: {unknown}; read the run with the sites it was tuned on"
            )

        def mode(site: Site, q: Tensor, project: Project, sdpa: Sdpa) -> Tensor:
            k_bar, v_bar = kv[site.path]
            return self._attend_edit(site, q, (k_bar, v_bar), project, sdpa)

        with self._in(mode):
            yield

    def replaying(self, sources: int, reads: Sequence[int] | None = None) -> AbstractContextManager[None]:
        """The first `sources` branches are the source's, under Eq. 1 with the live psi; the edits read those.

        The source's rows are ordered as in tuning (uncond and cond, or cond alone); the edits' rows follow.
        `reads` says for each branch of an edit which of the source's it reads; None: the one of its number.
        """
        chosen = list(range(sources) if reads is None else reads)

        def mode(site: Site, q: Tensor, project: Project, sdpa: Sdpa) -> Tensor:
            own, edits = q[:sources], q[sources:]
            bars = self._bars(site, own, *project(sources))
            read = bars[0][chosen], bars[1][chosen]
            out = self._attend_edit(site, edits, read, lambda: _rows(project(), sources), sdpa)
            return torch.cat([self._attend(site, own, bars, sdpa), out])

        return self._in(mode)

    @contextmanager
    def editing(
        self, sharpness: float = 1.0, mixing: Mixing = "replace", subject_map: SubjectMap | None = None
    ) -> Iterator[None]:
        """How the rows of edits attend, in `frozen` and `replaying`.

        Args:
            sharpness: A factor of the scores of Eq. 2.
            mixing: What they read, see `kvinv_pl.attention.mixing`.
            subject_map: For variants that follow the subject.
        """
        self._sharpness, self._mixing, self._subject_map = sharpness, mixing, subject_map
        try:
            yield
        finally:
            self._sharpness, self._mixing, self._subject_map = 1.0, "replace", None

    @contextmanager
    def observing(self) -> Iterator[dict[str, KV]]:
        """Plain attention, psi unused; the dictionary gets each layer's own K and V, detached."""
        recorded: dict[str, KV] = {}

        def mode(site: Site, q: Tensor, project: Project, sdpa: Sdpa) -> Tensor:
            k, v = project()
            recorded[site.path] = k.detach(), v.detach()
            return sdpa(q, k, v)

        with self._in(mode):
            yield recorded

    @contextmanager
    def _in(self, mode: Mode) -> Iterator[None]:
        self.check()
        before = {processor: processor.mode for processor in self._processors.values()}
        for processor in before:
            processor.mode = mode
        try:
            yield
        finally:
            for processor, previous in before.items():
                processor.mode = previous if self._attached else None

    def _bars(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> KV:
        """Eq. 1 with the live psi, in the dtype of q."""
        cp = self.psi[site.path]
        bars = cp(k, v)
        if not (isinstance(bars, tuple) and len(bars) == 2):
            got = type(bars).__name__
            raise UserError(f"{_name(cp)}.forward: expected (k_bar, v_bar), got a {got}")
        return _cast(cp, "forward", bars[0], q), _cast(cp, "forward", bars[1], q)

    def _attend(self, site: Site, q: Tensor, bars: KV, sdpa: Sdpa) -> Tensor:
        """Eq. 2, as the variant wants it."""
        cp = self.psi[site.path]
        return _cast(cp, "attend", cp.attend(q, *bars, sdpa), q)

    def _attend_edit(self, site: Site, q: Tensor, bars: KV, own: Callable[[], KV], sdpa: Sdpa) -> Tensor:
        """Eq. 2 of the edits' rows with the source's K-bar and V-bar; `own` projects the edits' own."""
        cp, (k_bar, v_bar) = self.psi[site.path], (expand_to_edits(site, q, bar) for bar in bars)
        if self._mixing == "concat":
            sdpa = with_own(own(), sdpa)
        subject = self._subject_map(site.grid) if self._subject_map is not None and cp.follows else None
        if self._sharpness != 1:
            sdpa = partial(sdpa, sharpness=self._sharpness)
        return _cast(cp, "attend_edit", cp.attend_edit(q, k_bar, v_bar, sdpa, subject), q)


def attach(unet: nn.Module, psi: Mapping[str, CPAttention]) -> Attachment:
    """Put each variant of `psi`, by module path, in its self-attention. Psi stays the caller's."""
    if not psi:
        raise UserError("there is no self-attention to attach CP-attn to: expected at least one site in psi")
    slots = {cp.site.slots for cp in psi.values()}
    if len(slots) > 1:
        raise UserError(f"expected one number of slots at all sites, got {sorted(slots)}: slots are rows")
    return Attachment(unet, psi)


def _rows(kv: KV, first: int) -> KV:
    return kv[0][first:], kv[1][first:]


def _cast(cp: CPAttention, method: str, got: Tensor, q: Tensor) -> Tensor:
    """What a variant returned, in the dtype of q; the shape must be right already."""
    if not (isinstance(got, Tensor) and got.is_floating_point()):
        kind = got.dtype if isinstance(got, Tensor) else type(got).__name__
        raise UserError(
            f"{_name(cp)}.{method} returned {kind} at {cp.site.path}; expected a tensor of floating "
            "point numbers, as k and v are"
        )
    if got.shape != q.shape:
        raise UserError(
            f"{_name(cp)}.{method} returned the shape {tuple(got.shape)} at {cp.site.path}; "
            f"expected {tuple(q.shape)} (branches, slots, tokens, dim)"
        )
    return got.to(q.dtype)


def _name(cp: CPAttention) -> str:
    """The class name of a variant, with those of the variants it wraps."""
    inner = ", ".join(_name(child) for child in cp.children() if isinstance(child, CPAttention))
    return f"{type(cp).__name__}({inner})" if inner else type(cp).__name__
