"""What an edit reads beside the source's K-bar and V-bar."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvinv_pl.attention.mixing import KEEPING, aligned, along_sphere, with_own

SHAPE = (2, 1, 10, 8)


def keys_values(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, *SHAPE, generator=generator)
    return k, v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sharpness: float = 1.0) -> Tensor:
    return F.scaled_dot_product_attention(sharpness * q, k, v, attn_mask=mask)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_aligned_finds_each_token_again_wherever_the_source_has_it(share: float) -> None:
    own = keys_values(0)
    order = torch.randperm(SHAPE[2], generator=torch.Generator().manual_seed(1))
    found = aligned(own, (own[0][:, :, order], own[1][:, :, order]), share)
    for got, mine in zip(found, own, strict=True):
        torch.testing.assert_close(got, mine)


def test_the_worst_matched_tokens_keep_their_own_and_the_others_are_the_sources() -> None:
    own, source = keys_values(0), keys_values(1)
    k, _ = aligned(own, source, 0.0)
    kept = (k == own[0]).all(-1)
    assert kept.sum(-1).tolist() == [[round(KEEPING * SHAPE[2])]] * SHAPE[0]
    nearest = torch.cdist(k[~kept], source[0].flatten(0, 2)).amin(-1)
    torch.testing.assert_close(nearest, torch.zeros_like(nearest), atol=1e-3, rtol=0)


def test_half_way_along_the_sphere_has_the_length_half_way_and_the_same_angle_to_both() -> None:
    a, b = keys_values(0)
    middle = along_sphere(a, b, 0.5)
    torch.testing.assert_close(middle.norm(dim=-1), (a.norm(dim=-1) + b.norm(dim=-1)) / 2)
    torch.testing.assert_close(F.cosine_similarity(middle, a, -1), F.cosine_similarity(middle, b, -1))
    torch.testing.assert_close(along_sphere(a, b, 0.0), a)
    torch.testing.assert_close(along_sphere(a, b, 1.0), b)


def test_with_its_own_keys_a_query_reads_both_sides_and_the_mask_is_about_the_sources_alone() -> None:
    (k, v), own, q = keys_values(0), keys_values(1), keys_values(2)[0]
    both = with_own(own, attention)
    joined = torch.cat([k, own[0]], 2), torch.cat([v, own[1]], 2)
    torch.testing.assert_close(both(q, k, v), attention(q, *joined))
    torch.testing.assert_close(both(q, k, v, sharpness=2.0), attention(q, *joined, sharpness=2.0))
    nothing = torch.zeros(1, 1, 1, SHAPE[2], dtype=torch.bool)
    torch.testing.assert_close(both(q, k, v, nothing), attention(q, *own))
    torch.testing.assert_close(both(q, k, v, torch.where(nothing, 0.0, -torch.inf)), attention(q, *own))
