"""What an edit reads beside the source's K-bar and V-bar."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvinv_pl.attention.mixing import with_own

SHAPE = (2, 1, 10, 8)


def keys_values(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, *SHAPE, generator=generator)
    return k, v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sharpness: float = 1.0) -> Tensor:
    return F.scaled_dot_product_attention(sharpness * q, k, v, attn_mask=mask)


def test_with_its_own_keys_a_query_reads_both_sides_and_the_mask_is_about_the_sources_alone() -> None:
    (k, v), own, q = keys_values(0), keys_values(1), keys_values(2)[0]
    both = with_own(own, attention)
    joined = torch.cat([k, own[0]], 2), torch.cat([v, own[1]], 2)
    torch.testing.assert_close(both(q, k, v), attention(q, *joined))
    torch.testing.assert_close(both(q, k, v, sharpness=2.0), attention(q, *joined, sharpness=2.0))
    nothing = torch.zeros(1, 1, 1, SHAPE[2], dtype=torch.bool)
    torch.testing.assert_close(both(q, k, v, nothing), attention(q, *own))
    torch.testing.assert_close(both(q, k, v, torch.where(nothing, 0.0, -torch.inf)), attention(q, *own))
