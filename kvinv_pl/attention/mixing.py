"""What an edit reads: the source's K-bar and V-bar, alone or together with its own keys and values."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvinv_pl.attention.processor import KV, Sdpa

Mixing = Literal["replace", "concat"]


def with_own(own_kv: KV, sdpa: Sdpa) -> Sdpa:
    """Eq. 2 in which every query may read the edit's own keys beside those it is given."""

    def both(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: float) -> Tensor:
        k, v = (torch.cat([given.to(q.dtype), mine], 2) for given, mine in zip((k, v), own_kv, strict=True))
        if mask is not None:  # it is about the source's keys
            mask = mask.expand(*mask.shape[:3], k.shape[2] - own_kv[0].shape[2])
            mask = F.pad(mask, (0, own_kv[0].shape[2]), value=float(mask.dtype == torch.bool))
        return sdpa(q, k, v, mask, **options)

    return both
