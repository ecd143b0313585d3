from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from kvinv_plugins.v_only import VOnly  # pyright: ignore[reportMissingImports]

from kvinv_pl.attention import Site
from kvinv_pl.errors import UserError

SITE = Site("up_blocks.1.attn1", slots=3, grid=(2, 5), dim=8, heads=2)


def kv(branches: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, branches, SITE.slots, SITE.tokens, SITE.dim, generator=generator)
    return k, v


@pytest.mark.parametrize("start", ["zeros", "noise", "source"])
@pytest.mark.parametrize("scale", ["layer", "head", "channel"])
def test_every_start_is_the_identity(start: Any, scale: Any) -> None:
    k, v = kv()
    k_bar, v_bar = VOnly(SITE, start=start, scale=scale)(k, v)
    assert torch.equal(k_bar, k) and torch.equal(v_bar, v)


def test_v_bar_is_lambda_v_plus_gamma_v_hat_slot_by_slot_and_k_bar_is_k() -> None:
    cp = VOnly(SITE)
    with torch.no_grad():
        for p in cp.parameters():
            p.normal_()
    k, v = kv()
    k_bar, v_bar = cp(k, v)
    assert k_bar is k
    for branch in range(2):
        for slot in range(SITE.slots):
            expected = cp.lambda_v[slot] * v[branch, slot] + cp.gamma_v[slot] * cp.v_hat[slot]
            assert torch.equal(v_bar[branch, slot], expected)


def test_psi_is_about_half_of_what_k_and_v_would_take() -> None:
    named = {name: tuple(p.shape) for name, p in VOnly(SITE, scale="head").named_parameters()}
    assert named == {"v_hat": (3, 10, 8), "lambda_v": (3, 1, 2), "gamma_v": (3, 1, 2)}


@pytest.mark.parametrize("start", ["zeros", "noise"])
def test_no_start_is_a_saddle_and_reset_goes_back_to_it(start: Any) -> None:
    cp = VOnly(SITE, start=start, noise_std=0.5)
    cp.reset(torch.Generator().manual_seed(5))
    first = {name: value.clone() for name, value in cp.state_dict().items()}
    cp(*kv())[1].square().sum().backward()
    learning = cp.v_hat if start == "zeros" else cp.gamma_v
    assert learning.grad is not None and learning.grad.flatten(1).abs().sum(1).gt(0).all()
    with torch.no_grad():
        for p in cp.parameters():
            p.normal_()
    cp.reset(torch.Generator().manual_seed(5))
    assert all(torch.equal(value, first[name]) for name, value in cp.state_dict().items())
    assert bool(cp.v_hat.any()) == (start == "noise")


def test_the_source_start_begins_at_the_sources_values_and_others_do_not_look() -> None:
    k, v = kv(branches=1)
    cp, other = VOnly(SITE, start="source"), VOnly(SITE)
    assert cp.observes and not other.observes
    for each in (cp, other):
        each.observe(k[0], v[0])
    k2, v2 = kv(branches=2)
    k_bar, v_bar = cp(k2, v2 + 1)  # whatever comes in, the source's V comes out
    assert torch.equal(k_bar, k2) and torch.equal(v_bar, v.expand(2, -1, -1, -1))
    assert torch.equal(other(k, v)[1], v) and not other.v_hat.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "ones"}, "start.*'ones'"),
        ({"start": "noise", "noise_std": 0.0}, "noise_std: expected more than 0, got 0.0"),
        ({"scale": "token"}, "scale.*'token'"),
    ],
)
def test_an_unknown_option_is_refused(options: dict[str, Any], message: str) -> None:
    # where types are checked at run time, that check comes first and speaks of the type
    with pytest.raises((UserError, TypeCheckError), match=f"(?s){message}"):
        VOnly(SITE, **options)
