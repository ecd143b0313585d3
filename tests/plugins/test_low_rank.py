from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]
from kvinv_plugins.low_rank import LowRank  # pyright: ignore[reportMissingImports]

from kvinv_pl.attention import CPAttention, Site
from kvinv_pl.errors import UserError

SITE = Site("up_blocks.1.attn1", slots=3, grid=(2, 5), dim=8, heads=2)


def kv(branches: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, branches, SITE.slots, SITE.tokens, SITE.dim, generator=generator)
    return k, v


def size(cp: CPAttention) -> int:
    return sum(p.numel() for p in cp.parameters())


@pytest.mark.parametrize("rank", [1, 4, 100])
@pytest.mark.parametrize("start", ["zeros", "noise"])
@pytest.mark.parametrize("scale", ["layer", "head", "channel"])
def test_every_start_is_the_identity(rank: int, start: Any, scale: Any) -> None:
    k, v = kv()
    k_bar, v_bar = LowRank(SITE, rank, start=start, scale=scale)(k, v)
    assert torch.equal(k_bar, k) and torch.equal(v_bar, v)


def test_k_hat_is_the_product_of_a_and_b_slot_by_slot() -> None:
    cp = LowRank(SITE, rank=2)
    with torch.no_grad():
        for p in cp.parameters():
            p.normal_()
    k, v = kv()
    k_bar, v_bar = cp(k, v)
    for branch in range(2):
        for slot in range(SITE.slots):
            k_hat, v_hat = cp.a_k[slot] @ cp.b_k[slot], cp.a_v[slot] @ cp.b_v[slot]
            assert torch.linalg.matrix_rank(k_hat) == 2
            expected = cp.lambda_k[slot] * k[branch, slot] + cp.gamma_k[slot] * k_hat
            torch.testing.assert_close(k_bar[branch, slot], expected)
            expected = cp.lambda_v[slot] * v[branch, slot] + cp.gamma_v[slot] * v_hat
            torch.testing.assert_close(v_bar[branch, slot], expected)


def test_psi_grows_with_the_rank_and_not_with_tokens_times_channels() -> None:
    large = Site("up_blocks.3.attn1", slots=1, grid=(64, 64), dim=320, heads=8)
    assert [size(LowRank(large, rank)) for rank in (1, 8)] == [2 * r * (4096 + 320) + 4 for r in (1, 8)]
    assert size(LowRank(large, 8)) < size(FullKV(large)) / 30


def test_a_site_of_few_tokens_has_no_larger_rank_than_they_have() -> None:
    small = Site("mid_block.attn1", slots=1, grid=(1, 2), dim=8, heads=2)
    cp = LowRank(small, rank=16)
    assert (cp.a_k.shape, cp.b_k.shape) == ((1, 2, 2), (1, 2, 8))
    assert cp.options["rank"] == 16


def test_at_the_start_gradient_reaches_b_and_after_one_step_everything() -> None:
    cp = LowRank(SITE, rank=2)
    optimizer = torch.optim.SGD(cp.parameters(), lr=0.1)
    for moved in (False, True):
        optimizer.zero_grad()
        k_bar, v_bar = cp(*kv())
        (k_bar.square() + v_bar.pow(3)).sum().backward()
        reached = {name for name, p in cp.named_parameters() if p.grad is not None and p.grad.any()}
        assert {"b_k", "b_v", "lambda_k", "lambda_v"} <= reached
        assert not moved or reached == {name for name, _ in cp.named_parameters()}
        optimizer.step()


@pytest.mark.parametrize("start", ["zeros", "noise"])
def test_reset_is_the_generators_and_undoes_everything(start: Any) -> None:
    cp = LowRank(SITE, rank=2, start=start)
    states: list[dict[str, torch.Tensor]] = []
    for seed in (5, 5, 6):
        with torch.no_grad():
            for p in cp.parameters():
                p.normal_()
        cp.reset(torch.Generator().manual_seed(seed))
        states.append({name: value.clone() for name, value in cp.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["a_k"], states[2]["a_k"])
    assert not torch.equal(states[0]["a_k"], states[0]["a_v"])


def test_the_noise_start_has_the_asked_width_at_every_rank() -> None:
    site = Site("up_blocks.1.attn1", slots=1, grid=(16, 16), dim=128, heads=2)
    for rank in (4, 64):
        cp = LowRank(site, rank, start="noise", noise_std=0.1)
        cp.reset(torch.Generator().manual_seed(0))
        assert 0.06 < (cp.a_k @ cp.b_k).std() < 0.14
        assert not cp.gamma_k.any() and not cp.gamma_v.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: expected 1 or more, got 0"),
        ({"start": "source"}, "start.*'source'"),
        ({"start": "noise", "noise_std": 0.0}, "noise_std: expected more than 0, got 0.0"),
        ({"scale": "token"}, "scale.*'token'"),
    ],
)
def test_an_option_that_means_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    # where types are checked at run time, that check comes first and speaks of the type
    with pytest.raises((UserError, TypeCheckError), match=f"(?s){message}"):
        LowRank(SITE, **options)
