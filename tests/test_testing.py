"""The conformance kit: each of its checks fails for a variant that is broken in this one way."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import pytest
import torch
from commands import kvinv
from torch import Tensor, nn

from kvinv_pl.attention import CPAttention, Site
from kvinv_pl.errors import UserError
from kvinv_pl.testing import CHECKS, NonconformingError, check_variant, report, trials

Sdpa = Callable[..., Tensor]


class Sound(CPAttention):
    """A learned V-hat for every token behind one gate; every broken variant is this one with one fault."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.v_hat = nn.Parameter(torch.zeros(site.slots, site.tokens, site.dim))
        self.gate = nn.Parameter(torch.ones(site.slots, 1, 1))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        self.v_hat.zero_()
        self.gate.fill_(1)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v + self.gate * self.v_hat


class Loud(Sound):
    """Is not the model's own attention at its start."""

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, 1.1 * v + self.gate * self.v_hat


class Saddle(Sound):
    """V-hat and its gate both start at zero: neither has a gradient."""

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        self.v_hat.zero_()
        self.gate.zero_()


class Idle(Sound):
    """Has a parameter that it never reads."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.k_hat = nn.Parameter(torch.zeros(site.slots, site.tokens, site.dim))


class Dicey(Sound):
    """Starts at random, from everybody's generator."""

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        self.v_hat.normal_()
        self.gate.zero_()


class Gossip(Sound):
    """What one slot learns is taken from all of them."""

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v + self.gate * (self.v_hat - 0.5 * self.v_hat.mean(0))


class Mingling(Sound):
    """The branches of a forward leak into each other."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.leak = nn.Parameter(torch.zeros(site.slots, 1, 1))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        super().reset(generator)
        self.leak.zero_()

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v + self.gate * self.v_hat + self.leak * v.mean(0)


class Forgetful(Sound):
    """Keeps a part of psi where no run looks for it."""

    def reset(self, generator: torch.Generator | None = None) -> None:
        super().reset(generator)
        self.direction = torch.randn(self.site.tokens, self.site.dim, generator=generator)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v + self.gate * self.v_hat + (self.gate - 1) * self.direction


class Single(Sound):
    """Multiplies K with a matrix in float32, whatever K is in."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.mix = nn.Parameter(torch.empty(site.slots, site.dim, site.dim))
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        super().reset(generator)
        if hasattr(self, "mix"):
            self.mix.copy_(torch.eye(self.site.dim).expand_as(self.mix))

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k @ self.mix, v + self.gate * self.v_hat


class Masking(Sound):
    """Pixels of the subject look at the subject alone."""

    mask: Tensor | None = None

    def bind(self, mask: Tensor | None) -> None:
        if mask is not None:
            mask = nn.functional.interpolate(mask[None], self.site.grid, mode="area")[0].flatten(1) >= 0.5
        self.mask = mask

    def looks(self, inside: Tensor) -> Tensor:
        return inside[:, None, :] | ~inside[:, :, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sdpa: Sdpa) -> Tensor:
        return sdpa(q, k, v) if self.mask is None else sdpa(q, k, v, self.looks(self.mask))


class Blind(Masking):
    """Pixels outside the subject may look nowhere, and every kernel makes something else of it."""

    def looks(self, inside: Tensor) -> Tensor:
        return inside[:, None, :] & inside[:, :, None]


class Sticky(Masking):
    """Keeps the mask of the picture before."""

    def bind(self, mask: Tensor | None) -> None:
        if mask is not None:
            super().bind(mask)


class Peeking(Sound):
    """Decides by what it has learned, in Python."""

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(k, v) if float(self.gate.detach().max()) > 0 else (k, v)


class Mistyped(Sound):
    """Has an option whose default is not of its type.

    Args:
        site: The self-attention to upgrade.
        rank: How many.
    """

    def __init__(self, site: Site, rank: int = 0.5):  # pyright: ignore[reportArgumentType]
        super().__init__(site)


class Silent(Sound):
    """Has an option of which it says nothing.

    Args:
        site: The self-attention to upgrade.
    """

    def __init__(self, site: Site, rank: int = 4):
        super().__init__(site)


class Square(Sound):
    """Takes the root of the number of tokens for the side of the grid."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.v_hat = nn.Parameter(torch.zeros(site.slots, int(site.tokens**0.5) ** 2, site.dim))


class Stashing(Sound):
    """Eq. 2 needs what Eq. 1 left behind."""

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.extra = self.gate * self.v_hat + torch.zeros_like(v)
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sdpa: Sdpa) -> Tensor:
        return sdpa(q, k, v) + sdpa(q, k, self.extra)


BROKEN: dict[str, type[CPAttention]] = {
    "identity at reset": Loud,
    "alive at reset": Saddle,
    "every parameter learns": Idle,
    "reset is deterministic": Dicey,
    "slots apart": Gossip,
    "any number of branches": Mingling,
    "saved and loaded exactly": Forgetful,
    "half precision": Single,
    "any kernel": Blind,
    "compiles": Peeking,
    "built from its own record": Mistyped,
    "every option documented": Silent,
    "grids that are not square": Square,
    "reading frozen": Stashing,
    "a mask comes off": Sticky,
}
ALSO = {"alive at reset": {"every parameter learns"}}  # what never gets away learns nothing


@cache
def failing(variant: type[CPAttention]) -> dict[str, str]:
    """The checks that a variant fails, and what each says."""
    return {trial.check.name: error for trial in trials(variant) if (error := trial.failure())}


def test_there_is_a_broken_variant_for_every_check() -> None:
    assert list(BROKEN) == [check.name for check in CHECKS]


@pytest.mark.parametrize("variant", [Sound, Masking])
def test_a_sound_variant_fails_no_check(variant: type[CPAttention]) -> None:
    assert not failing(variant)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_variant_fails_the_check_of_its_fault_and_no_other(name: str) -> None:
    assert failing(BROKEN[name]).keys() == {name} | ALSO.get(name, set())
