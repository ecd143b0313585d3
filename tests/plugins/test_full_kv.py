from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]

from kvinv_pl.attention import Site
from kvinv_pl.errors import UserError

SITE = Site("up_blocks.1.attn1", slots=3, grid=(2, 5), dim=8, heads=2)


def kv(branches: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, branches, SITE.slots, SITE.tokens, SITE.dim, generator=generator)
    return k, v


@pytest.mark.parametrize("start", ["zeros", "noise", "source"])
@pytest.mark.parametrize("scale", ["layer", "head", "channel"])
def test_every_start_is_the_identity(start: Any, scale: Any):
    k, v = kv()
    k_bar, v_bar = FullKV(SITE, start=start, scale=scale)(k, v)
    assert torch.equal(k_bar, k) and torch.equal(v_bar, v)


def test_k_bar_is_lambda_k_plus_gamma_k_hat_slot_by_slot():
    cp = FullKV(SITE)
    with torch.no_grad():
        for p in cp.parameters():
            p.normal_()
    k, v = kv()
    k_bar, v_bar = cp(k, v)
    for branch in range(2):
        for slot in range(SITE.slots):
            expected = cp.lambda_k[slot] * k[branch, slot] + cp.gamma_k[slot] * cp.k_hat[slot]
            assert torch.equal(k_bar[branch, slot], expected)
            expected = cp.lambda_v[slot] * v[branch, slot] + cp.gamma_v[slot] * cp.v_hat[slot]
            assert torch.equal(v_bar[branch, slot], expected)


@pytest.mark.parametrize(("scale", "count"), [("layer", 1), ("head", 2), ("channel", 8)])
def test_lambda_and_gamma_are_as_many_as_asked_for(scale: Any, count: int):
    cp = FullKV(SITE, scale=scale)
    assert {tuple(p.shape) for p in (cp.lambda_k, cp.gamma_k, cp.lambda_v, cp.gamma_v)} == {(3, 1, count)}
    assert cp.k_hat.shape == cp.v_hat.shape == (3, 10, 8)
    assert {p.dtype for p in cp.parameters()} == {torch.float32}


def test_the_lambda_of_a_head_scales_the_channels_of_that_head():
    cp = FullKV(SITE, scale="head")
    with torch.no_grad():
        cp.lambda_k[:, :, 1] = 0
    k, v = kv()
    k_bar, _ = cp(k, v)
    assert torch.equal(k_bar[..., :4], k[..., :4]) and not k_bar[..., 4:].any()


def test_reset_undoes_everything():
    cp = FullKV(SITE)
    start = {name: p.clone() for name, p in cp.state_dict().items()}
    with torch.no_grad():
        for p in cp.parameters():
            p.normal_()
    cp.reset()
    assert all(torch.equal(p, start[name]) for name, p in cp.state_dict().items())


def test_a_noise_start_is_the_generators_and_has_the_asked_width():
    cp = FullKV(SITE, start="noise", noise_std=0.1)
    seen = []
    for _ in range(2):
        cp.reset(torch.Generator().manual_seed(5))
        seen.append(cp.k_hat.clone())
    assert torch.equal(*seen)
    assert 0.08 < cp.k_hat.std() < 0.12
    assert not torch.equal(cp.k_hat, cp.v_hat)
    assert not cp.gamma_k.any() and not cp.gamma_v.any()


@pytest.mark.parametrize("start", ["zeros", "noise"])
def test_no_start_is_a_saddle(start: Any):
    cp = FullKV(SITE, start=start)
    k_bar, v_bar = cp(*kv())
    (k_bar.square() + v_bar).sum().backward()
    learning = ("k_hat", "v_hat") if start == "zeros" else ("gamma_k", "gamma_v")
    assert all(getattr(cp, name).grad.any() for name in learning)


def test_the_source_start_begins_at_the_sources_keys_and_values():
    k, v = kv(branches=1)
    cp = FullKV(SITE, start="source")
    assert cp.observes
    cp.observe(k[0], v[0])
    k_bar, v_bar = cp(*kv(branches=2))  # whatever comes in, the source comes out
    assert torch.equal(k_bar, k.expand(2, -1, -1, -1)) and torch.equal(v_bar, v.expand(2, -1, -1, -1))
    cp.reset()
    assert torch.equal(cp(k, v)[0], k)


@pytest.mark.parametrize("start", ["zeros", "noise"])
def test_other_starts_do_not_look_at_the_source(start: Any):
    cp = FullKV(SITE, start=start)
    k, v = kv(branches=1)
    cp.observe(k[0], v[0])
    assert not cp.observes
    assert torch.equal(cp(k, v)[0], k) and not torch.equal(cp.k_hat, k[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "ones"}, "start.*'ones'"),
        ({"start": "noise", "noise_std": 0.0}, "noise_std: expected more than 0, got 0.0"),
        ({"scale": "token"}, "scale.*'token'"),
    ],
)
def test_an_unknown_option_is_refused(options: dict[str, Any], message: str):
    # where types are checked at run time, that check comes first and speaks of the type
    with pytest.raises((UserError, TypeCheckError), match=f"(?s){message}"):
        FullKV(SITE, **options)
