"""Eq. 2 between the subjects, and between the backgrounds, of a picture and its edit."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kvinv_pl.attention import CPAttention, Sdpa, Site, resolve
from kvinv_pl.errors import UserError

OUTLINE = 0.1  # a token with more than this share of both subject and background is a part of both


class Masked(CPAttention):
    """Another variant, in which the subject and the background each attend to themselves alone.

    The mask splits the source's keys, and while psi is tuned its queries, too, so that an edit reads K-bar
    and V-bar as they were learned. Tokens on the subject's outline show both: both read their keys, and their
    queries read all. Mask-guided as in MasaCtrl (Cao et al., 2023), which cuts the outline at one half
    and is otherwise this around `recorded`.

    Args:
        site: The self-attention to upgrade.
        inner: The variant that learns K-bar and V-bar; default: the paper's own, full_kv.
        queries: Which of an edit's queries are the subject's. source: where the source has it, by the mask.
            words: where the edit's attention map of the subject's word is largest, as many as the
            source's mask has. union: both, because the subject moves. agreed: where both have it; where one
            of them does, a query reads all keys.
        separate: Whether the other queries read only the background's keys, or all keys.
    """

    wants_mask = True

    def __init__(
        self,
        site: Site,
        inner: Callable[[Site], CPAttention] | None = None,
        queries: Literal["source", "words", "union", "agreed"] = "agreed",
        separate: bool = True,
    ):
        super().__init__(site)
        if queries not in ("source", "words", "union", "agreed"):
            raise UserError(f"queries: expected source, words, union or agreed, got {queries!r}")
        make = inner or resolve("full_kv")
        self.options = {**self.options, "inner": make}
        self.inner = make(site)
        if isinstance(self.inner, Masked):
            raise UserError("inner: expected a variant to put the mask around, got Masked: name another one")
        self.queries, self.separate = queries, separate
        self.observes, self.at_pivot = self.inner.observes, self.inner.at_pivot
        self.follows = queries != "source" or self.inner.follows
        moves = {"reading frozen": "an edit's subject may be in another place than the source's"}
        self.exempt = {**self.inner.exempt, **(moves if queries != "source" else {})}
        # the keys that subject and background read, and the queries that are more the subject's
        self._subject: Bool[Tensor, "slots tokens"] | None = None
        self._background: Bool[Tensor, "slots tokens"] | None = None
        self._within: Bool[Tensor, "slots tokens"] | None = None

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Reset the other variant."""
        self.inner.reset(generator)

    def observe(self, k: Float[Tensor, "slots tokens dim"], v: Float[Tensor, "slots tokens dim"]) -> None:
        """Show the source's K and V to the other variant."""
        self.inner.observe(k, v)

    def why_not(self, reading: str) -> str | None:
        """Refuse blend, and what the other variant refuses."""
        if reading == "blend":
            return "the mask says which of the source's keys are read, and blend reads the edit's own"
        return self.inner.why_not(reading)

    def bind(self, mask: Float[Tensor, "slots h w"] | None) -> None:
        """Resize the masks to the site's grid; a subject too small for it keeps the pixels it covers most."""
        self.inner.bind(mask)
        self._subject = self._background = self._within = None
        if mask is not None:
            share = F.interpolate(mask[:, None].float(), self.site.grid, mode="area")[:, 0].flatten(1)
            most, least = share.amax(1, keepdim=True), share.amin(1, keepdim=True)
            self._subject = (share > OUTLINE) | (share == most)
            self._background = (share < 1 - OUTLINE) | (share == least)
            self._within = (share > 0.5) | (share == most)

    def forward(
        self, k: Float[Tensor, "branches slots tokens dim"], v: Float[Tensor, "branches slots tokens dim"]
    ) -> tuple[Float[Tensor, "branches slots tokens dim"], Float[Tensor, "branches slots tokens dim"]]:
        """Eq. 1 as the other variant has it."""
        return self.inner(k, v)

    def attend(
        self,
        q: Float[Tensor, "branches slots tokens dim"],
        k: Float[Tensor, "branches slots tokens dim"],
        v: Float[Tensor, "branches slots tokens dim"],
        sdpa: Sdpa,
    ) -> Float[Tensor, "branches slots tokens dim"]:
        """Eq. 2 of the source's own pass, whose queries are split as its keys are."""
        inner = partial(self.inner.attend, q, k, v)
        if self._subject is None:
            return inner(sdpa)
        return self._apart(q, inner, sdpa, *self._source_queries())

    def attend_edit(
        self,
        q: Float[Tensor, "branches slots tokens dim"],
        k: Float[Tensor, "branches slots tokens dim"],
        v: Float[Tensor, "branches slots tokens dim"],
        sdpa: Sdpa,
        subject: Float[Tensor, "branches slots h w"] | None = None,
    ) -> Float[Tensor, "branches slots tokens dim"]:
        """Eq. 2 of an edit: the subject's queries, the background's, and those of which it is not known."""
        inner = partial(self.inner.attend_edit, q, k, v, subject=subject)
        if self._subject is None:
            return inner(sdpa)
        source_subject, outline = self._source_queries()
        if self.queries == "source":
            return self._apart(q, inner, sdpa, source_subject, outline)
        if subject is None:  # its place is not known yet
            return inner(sdpa)
        # it moves, and keeps its size: thresholded midway, such a map has half of the picture
        size = source_subject.sum(2, keepdim=True)
        edit_subject = subject.flatten(2).argsort(dim=2, descending=True, stable=True).argsort(2) < size
        if self.queries == "agreed":
            undecided = outline | (edit_subject ^ source_subject)
            return self._apart(q, inner, sdpa, edit_subject & source_subject, undecided)
        return self._apart(
            q, inner, sdpa, edit_subject if self.queries == "words" else edit_subject | source_subject
        )

    def _source_queries(self) -> tuple[Bool[Tensor, "1 slots tokens"], Bool[Tensor, "1 slots tokens"]]:
        """Where the source has its subject, and where its outline."""
        assert self._subject is not None and self._background is not None and self._within is not None
        return self._within[None], (self._subject & self._background)[None]

    def _apart(
        self,
        q: Float[Tensor, "branches slots tokens dim"],
        inner: Callable[[Sdpa], Tensor],
        sdpa: Sdpa,
        subject: Bool[Tensor, "#branches slots tokens"],
        undecided: Bool[Tensor, "#branches slots tokens"] | None = None,
    ) -> Float[Tensor, "branches slots tokens dim"]:
        """The subject's queries from its keys, the others from the background's, undecided ones from all."""

        def reading(keys: Bool[Tensor, "slots tokens"] | None) -> Tensor:
            out = inner(partial(self._among, sdpa, keys))
            if out.shape != q.shape:
                raise UserError(
                    f"inner: {type(self.inner).__name__} returned the shape {tuple(out.shape)} at "
                    f"{self.site.path}; expected {tuple(q.shape)} (branches, slots, tokens, dim)"
                )
            return out

        mine, others = reading(self._subject), reading(self._background if self.separate else None)
        out = torch.where(subject[..., None], mine, others)
        if undecided is None or not self.separate:  # where the others read all keys, so do the undecided
            return out
        return torch.where(undecided[..., None], reading(None), out)

    def _among(
        self,
        sdpa: Sdpa,
        keys: Bool[Tensor, "slots tokens"] | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Eq. 2 on some of the source's keys, or all; keys must be tokens of the grid."""
        if k.shape[2] != self.site.tokens:
            raise UserError(
                f"inner: expected a variant whose keys are the {self.site.tokens} tokens of "
                f"{self.site.path}, got {type(self.inner).__name__}, which attends to {k.shape[2]}: "
                "the mask does not cover the others; use it without Masked"
            )
        if keys is None:
            return sdpa(q, k, v, mask)
        allowed = keys[None, :, None]
        if mask is None:
            return sdpa(q, k, v, allowed)
        if mask.dtype == torch.bool:
            return sdpa(q, k, v, mask & allowed)
        return sdpa(q, k, v, mask.masked_fill(~allowed, -torch.inf))
