"""The class by itself; what it does in a fit and an edit is in test_reading."""

from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from kvinv_plugins.recorded import Recorded  # pyright: ignore[reportMissingImports]

from kvinv_pl.attention import Site
from kvinv_pl.errors import UserError

SITE = Site("up_blocks.1.attn1", slots=3, grid=(2, 5), dim=8, heads=2)


def test_it_has_nothing_to_learn_and_changes_nothing() -> None:
    cp = Recorded(SITE)
    k, v = torch.randn(2, 2, *(SITE.slots, SITE.tokens, SITE.dim))
    cp.reset(torch.Generator().manual_seed(0))
    assert not cp.state_dict()
    assert cp(k, v) == (k, v)


def test_it_can_be_read_frozen_and_says_why_not_blended() -> None:
    cp = Recorded(SITE)
    assert cp.why_not("frozen") is None
    assert "plain DDIM" in str(cp.why_not("blend"))


def test_where_the_pass_is_made_is_its_option() -> None:
    assert [Recorded(SITE, at).at_pivot for at in ("rollout", "pivot")] == [False, True]
    assert Recorded(SITE, "pivot").options == {"at": "pivot"} and Recorded(SITE).options == {"at": "rollout"}
    with pytest.raises((UserError, TypeCheckError), match=r"(?s)at.*'source'"):
        wrong: Any = "source"
        Recorded(SITE, wrong)
