"""Eq. 1 of CP-attn as a module, of which every variant is a subclass."""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Self

from kvinv_pl.attention.processor import Sdpa
from kvinv_pl.attention.sites import Site
from kvinv_pl.errors import UserError


class CPAttention(nn.Module):
    """Eq. 1 at one site. A variant is a subclass with parameters, `reset` and `forward`.

    The batch axis is slots: work items that are tuned side by side and must not see each other. Parameters
    are (slots, tokens, dim), or (slots, 1, 1) for a scalar, in fp32; k and v arrive as (branches, slots,
    tokens, dim), so that they broadcast. Results may have any dtype: they are cast afterwards.
    Buffers are (slots, ...) too and are kept with the parameters, except those registered persistent=False.
    A variant that has to see the source's own K and V sets `observes` and defines `observe`; one that learns
    nothing has no parameters, and its phases no inner steps.
    """

    observes: bool = False
    at_pivot: bool = False
    """For a variant that learns nothing: whether K-bar and V-bar come from the pass at the pivot z-hat_t, in
    place of z-tilde_t; z-tilde rolls out reading them."""
    wants_mask: bool = False
    """Whether the variant needs a mask of the subject."""
    follows: bool = False
    """Whether `attend_edit` is given attention maps of the edit to the subject's word."""
    exempt: Mapping[str, str] = MappingProxyType({})
    """Checks of `kvinv_pl.testing` that the variant cannot pass, by name, each with the reason."""
    options: dict[str, Any]
    """The arguments of the constructor besides the site; they are saved with a run and loaded with it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Save the arguments as `options`, so that variants need not."""
        instance = super().__new__(cls)
        if args or kwargs:  # copying and unpickling pass none
            given = inspect.signature(cls.__init__).bind(instance, *args, **kwargs)
            given.apply_defaults()
            _, _, *options = given.arguments.items()  # self and site
            instance.__dict__["options"] = dict(options)
        return instance

    def __init__(self, site: Site):
        """Take the place in the U-Net: `site.slots`, `site.tokens`, `site.dim`, `site.heads`, `site.grid`."""
        super().__init__()
        self.site = site

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Go back to the start of a phase, where forward returns k and v as they came."""

    def observe(self, k: Float[Tensor, "slots tokens dim"], v: Float[Tensor, "slots tokens dim"]) -> None:
        """See, after reset and only if `observes`, the source's K and V of the conditional branch."""

    def why_not(self, reading: str) -> str | None:
        """Why this `reading` (frozen or blend) makes no sense for the variant; None where it does."""

    def bind(self, mask: Float[Tensor, "slots h w"] | None) -> None:
        """Take the mask of each slot, 0 to 1 and of any size, at the start of a phase or an edit."""

    @property
    def takes_masks(self) -> bool:
        """Whether the variant has a `bind` of its own."""
        return type(self).bind is not CPAttention.bind

    def forward(
        self, k: Float[Tensor, "branches slots tokens dim"], v: Float[Tensor, "branches slots tokens dim"]
    ) -> tuple[Float[Tensor, "branches slots tokens dim"], Float[Tensor, "branches slots tokens dim"]]:
        """Eq. 1: K-bar and V-bar from K and V."""
        raise UserError(f"{type(self).__name__} must define forward(k, v) -> (k_bar, v_bar)")

    def attend(
        self,
        q: Float[Tensor, "branches slots tokens dim"],
        k: Float[Tensor, "branches slots tokens dim"],
        v: Float[Tensor, "branches slots tokens dim"],
        sdpa: Sdpa,
    ) -> Float[Tensor, "branches slots tokens dim"]:
        """Eq. 2 on K-bar and V-bar; `sdpa(q, k, v, mask=None)` splits the heads, attends and merges them.

        A mask is bool (True: may attend) or added to the scores, and broadcasts to (branches, slots, tokens,
        keys).
        """
        return sdpa(q, k, v)

    def attend_edit(
        self,
        q: Float[Tensor, "branches slots tokens dim"],
        k: Float[Tensor, "branches slots tokens dim"],
        v: Float[Tensor, "branches slots tokens dim"],
        sdpa: Sdpa,
        subject: Float[Tensor, "branches slots h w"] | None = None,
    ) -> Float[Tensor, "branches slots tokens dim"]:
        """Eq. 2 of an edit in reading `frozen`: q is the edit's, K-bar and V-bar are the source's.

        If the variant `follows`, `subject` is the edit's own cross-attention to the subject's word on the
        site's grid, as far as it is known, each row from 0 where it is least to 1 where it is most;
        None in the first steps, in which the place of the subject is not settled.
        """
        return self.attend(q, k, v, sdpa)

    def per_channel(self, factor: Float[Tensor, "slots 1 n"]) -> Float[Tensor, "slots 1 m"]:
        """One value a head as one value a channel; one a layer (n = 1) or a channel broadcasts as it is."""
        count = factor.shape[-1]
        return factor if count == 1 else factor.repeat_interleave(self.site.dim // count, dim=-1)
