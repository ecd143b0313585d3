"""One self-attention of diffusers with a variant in it, as tuning and editing use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn

from kvinv_pl.attention.attachment import attach
from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.attention.sites import Site

PATH = "attn1"
# square, so that a variant that takes every grid for square fails in that check only
SITE = Site(PATH, slots=3, grid=(4, 4), dim=16, heads=2)
Factory = Callable[[Site], CPAttention]


def seeded(seed: int) -> torch.Generator:
    """A CPU generator of its own."""
    return torch.Generator().manual_seed(seed)


def features(branches: int, site: Site = SITE, seed: int = 0) -> Float[Tensor, "branches slots tokens dim"]:
    """What reaches the self-attention; fewer branches are the first of many."""
    return torch.randn(8, site.slots, site.tokens, site.dim, generator=seeded(seed))[:branches]


class Harness:
    """A U-Net of a single self-attention, with the variant attached as a run attaches it."""

    def __init__(self, variant: Factory, site: Site = SITE, dtype: torch.dtype = torch.float32) -> None:
        """Make the layer, always with the same weights, in `dtype`, and the variant for `site`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = Attention(site.dim, heads=site.heads, dim_head=site.dim // site.heads)
        unet = nn.Module()
        unet.add_module(PATH, self.layer.requires_grad_(False).to(dtype))
        self.site, self.dtype, self.cp = site, dtype, variant(site)
        self.attachment = attach(unet, {PATH: self.cp})

    def values(self) -> dict[str, nn.Parameter]:
        """What is learned."""
        return dict(self.cp.named_parameters())

    def stored(self) -> dict[str, Tensor]:
        """Psi as a run keeps it: what is learned, and the buffers beside it."""
        return self.cp.state_dict()

    @torch.no_grad()
    def start(self, seed: int = 0) -> Harness:
        """Psi where a phase begins: after `reset`, and after `observe` for a variant that observes."""
        self.cp.reset(seeded(seed))
        if self.cp.observes:
            with self.attachment.observing() as kv:
                self.bare(features(1, self.site).to(self.dtype))
            k, v = kv[PATH]
            self.cp.observe(k[-1].float(), v[-1].float())
        return self

    @torch.no_grad()
    def shake(self) -> Harness:
        """Psi away from its start, as tuning leaves it; each slot by draws of its own."""
        for value in self.values().values():
            for slot, own in enumerate(value.unbind() if value.ndim else [value]):
                own += 0.3 * torch.randn(own.shape, generator=seeded(100 + slot))
        return self

    @torch.no_grad()
    def read(self, other: Harness) -> Harness:
        """Take psi from another harness, slot by slot, as far as there are slots here."""
        for name, value in self.stored().items():
            value.copy_(other.stored()[name][: self.site.slots])
        return self

    def mask(self) -> Harness:
        """Bind a mask to each slot, of another size than the grid; each slot another part of the picture."""
        masks = torch.zeros(self.site.slots, 2 * self.site.grid[0], 12)
        for slot, mask in enumerate(masks):
            mask[:, : 3 * (slot + 1)] = 1
        self.cp.bind(masks)
        return self

    def bare(self, x: Tensor) -> Tensor:
        """The layer's own attention, or as the mode around it has it."""
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def blend(self, x: Tensor) -> Tensor:
        """Eq. 1 and Eq. 2 with the live psi."""
        with self.attachment.blend():
            return self.bare(x)

    def record(self, x: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """As `blend`, with the K-bar and V-bar that a run would store."""
        with self.attachment.blend(record=True) as kv:
            return self.bare(x), kv

    def frozen(self, x: Tensor, kv: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Eq. 2 on K-bar and V-bar that were stored."""
        with self.attachment.frozen(kv):
            return self.bare(x)

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        """Of a squared error, as Eq. 3 is one, by psi's names; zero where no gradient arrives."""
        values = self.values()
        if not values:
            return {}
        error = (self.blend(x) - features(len(x), self.site, seed=1).to(x.dtype)).float().square().sum()
        found = torch.autograd.grad(error, list(values.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(values, found, strict=True))


def attention(heads: int, core: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What `CPAttention.attend` is given as `sdpa`: `core` on heads, with the same rules for masks."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            mask = mask.expand(*q.shape[:3], k.shape[2]).unsqueeze(2)
        apart = [
            x.expand(*q.shape[:2], -1, -1).unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (q, k, v)
        ]
        return core(*apart, mask).transpose(-3, -2).flatten(-2)

    return sdpa


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Eq. 2 by torch's fused kernel, as runs compute it."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Eq. 2 as it is printed: softmax(Q K^T / sqrt(d)) V."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v
