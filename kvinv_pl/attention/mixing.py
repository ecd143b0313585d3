"""What an edit reads: the source's K-bar and V-bar, alone or together with its own keys and values."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.attention.processor import KV, Sdpa

Mixing = Literal["replace", "concat", "aligned"]
KEEPING = 0.2
"""The share of an edit's tokens, those with the worst match in the source, that keep their own."""


def with_own(own: KV, sdpa: Sdpa) -> Sdpa:
    """Eq. 2 in which every query may read the edit's own keys beside those it is given."""

    def both(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: float) -> Tensor:
        k, v = (torch.cat([given.to(q.dtype), mine], 2) for given, mine in zip((k, v), own, strict=True))
        if mask is not None:  # it is about the source's keys
            mask = mask.expand(*mask.shape[:3], k.shape[2] - own[0].shape[2])
            mask = F.pad(mask, (0, own[0].shape[2]), value=float(mask.dtype == torch.bool))
        return sdpa(q, k, v, mask, **options)

    return both


def aligned(own: KV, source: KV, share: float) -> KV:
    """K-bar and V-bar brought to where the edit has what they show, and mixed with the edit's own.

    After Cora (arXiv 2505.23907): each token of the edit takes those of the source's token whose key is most
    like its own, and goes `share` of the way back to its own along the sphere; the worst matched KEEPING of
    the tokens keep their own.

    Args:
        own: The edit's keys and values, (branches, slots, tokens, dim).
        source: K-bar and V-bar, of the same shape.
        share: 0 (the source's alone) to 1 (the edit's own).
    """
    likeness = F.normalize(own[0].float(), dim=-1) @ F.normalize(source[0].float(), dim=-1).mT
    best, at = likeness.max(-1)
    matched = best >= best.quantile(KEEPING, dim=-1, keepdim=True)
    at = at[..., None].expand_as(source[0])
    mixed = (along_sphere(bar.gather(2, at), mine, share) for bar, mine in zip(source, own, strict=True))
    k, v = (torch.where(matched[..., None], new, mine) for new, mine in zip(mixed, own, strict=True))
    return k, v


def along_sphere(
    a: Float[Tensor, "*rows dim"], b: Float[Tensor, "*rows dim"], share: float
) -> Float[Tensor, "*rows dim"]:
    """From a (share 0) to b (1): directions along the great circle between them, lengths in proportion."""
    x, y = a.float(), b.float()
    long_x, long_y = x.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
    x, y = x / long_x.clamp_min(1e-12), y / long_y.clamp_min(1e-12)
    angle = (x * y).sum(-1, keepdim=True).clamp(-1, 1).acos().clamp_min(1e-4)
    direction = (((1 - share) * angle).sin() * x + (share * angle).sin() * y) / angle.sin().clamp_min(1e-12)
    straight = torch.lerp(x, y, share)
    direction = torch.where(angle > 1e-3, direction, straight)
    return (direction * ((1 - share) * long_x + share * long_y)).to(a.dtype)
