"""Large pictures go through the VAE by tiles, all others as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fits
import pytest
import torch
from torch import Tensor

from kvinv_pl.models import vae_tiles
from kvinv_pl.models.stable_diffusion import Backbone
from kvinv_pl.training.estimate import Estimate
from kvinv_pl.training.machine import Machine

SIDES = (24, 40)
HERE = Machine(torch.device("cpu"), torch.float32, 1, 1e9)


@pytest.fixture
def backbone() -> Backbone:
    return Backbone.load(str(fits.checkpoint()))


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(2, 3, *SIDES, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Tiles of 16 pixels, for pictures of more pixels than given."""

    def use(whole: int) -> None:
        monkeypatch.setattr(vae_tiles, "TILE", 16)
        monkeypatch.setattr(vae_tiles, "WHOLE", whole)

    return use


def test_a_picture_above_the_limit_is_taken_by_tiles_as_diffusers_takes_it_and_one_at_it_is_not(
    backbone: Backbone, pixels: Tensor, small_tiles: Callable[[int], None]
) -> None:
    z, seen = backbone.encode(pixels), list[int]()
    decoded, scale = backbone.decode(z), backbone.vae.config["scaling_factor"]
    small_tiles(SIDES[0] * SIDES[1])
    assert torch.equal(backbone.encode(pixels), z) and torch.equal(backbone.decode(z), decoded)

    small_tiles(SIDES[0] * SIDES[1] - 1)
    vae: Any = backbone.vae
    for part in (vae.encoder, vae.decoder):
        part.register_forward_pre_hook(lambda _, args: seen.append(max(args[0].shape[-2:])))
    tiled, rendered = backbone.encode(pixels), backbone.decode(z)
    # 2 x 4 tiles that overlap by a quarter
    assert len(seen) == 16 and max(seen[:8]) == 16 and max(seen[8:]) == 8

    theirs: Any = Backbone.load(str(fits.checkpoint())).vae
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = 16, 8
    theirs.enable_tiling()
    with torch.no_grad():
        assert torch.equal(tiled, theirs.encode(pixels).latent_dist.mean * scale)
        assert torch.equal(rendered, theirs.decode(z / scale).sample.clamp(-1, 1))
    assert not torch.equal(tiled, z) and not torch.equal(rendered, decoded)
    small_tiles(10**9)  # and the next picture is taken as a whole
    assert torch.equal(backbone.encode(pixels), z) and torch.equal(backbone.decode(z), decoded)


def test_a_plan_counts_what_decoding_by_tiles_takes_and_says_so(small_tiles: Callable[[int], None]) -> None:
    def planned(whole: int) -> tuple[int, str]:
        small_tiles(whole)
        plan = Estimate(fits.model(), (32, 32), 1, 1, HERE)
        return plan.costs.decoding, "".join(plan._memory(1))

    (whole, said), (tiled, told) = planned(32 * 32), planned(32 * 32 - 1)
    assert tiled < whole and "or decoding by tiles" in told and "by tiles" not in said
