"""Watching where a U-Net looks: the maps are true, and the U-Net is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from torch import Tensor, nn

from kvinv_pl.attention import CPAttention, Selection, Site, select, self_attentions
from kvinv_pl.attention.attachment import attach
from kvinv_pl.attention.cross_attention import cross_attentions, recording_maps, resized
from kvinv_pl.models.stable_diffusion import Backbone

GRID = (8, 6)  # of the latents: not square
PROMPTS = ["", "a cat running"]
ROWS = [[], [2, 3]]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(str(checkpoints.make("tiny", tmp_path_factory.mktemp("models"))))


@pytest.fixture(scope="module")
def inputs(backbone: Backbone) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.randn(2, backbone.latent_channels, *GRID, generator=torch.Generator().manual_seed(0))
    return z, torch.tensor([400, 700]), backbone.embed(PROMPTS)


def processors(unet: nn.Module) -> list[Any]:
    return [module.processor for module in unet.modules() if hasattr(module, "processor")]


def hooks(unet: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in unet.modules())


def probabilities(backbone: Backbone, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """softmax(Q K^T / sqrt d) of every cross-attention, (rows, heads, tokens, length), as it is projected."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for path in cross_attentions(backbone.unet):
        layer: Any = backbone.unet.get_submodule(path)
        for projection in (layer.to_q, layer.to_k):
            keep = seen.setdefault(path, []).append
            handles.append(projection.register_forward_hook(lambda _, args, out, keep=keep: keep(out)))
    backbone.predict(*inputs)
    for handle in handles:
        handle.remove()
    maps = {}
    for path, (q, k) in seen.items():
        heads: int = backbone.unet.get_submodule(path).heads  # pyright: ignore[reportAssignmentType]
        q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
        maps[path] = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return maps


def test_a_map_is_the_probability_of_the_tokens_of_each_row_as_the_mean_of_the_heads(
    backbone: Backbone, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    with recording_maps(backbone.unet, ROWS) as maps:
        backbone.predict(*inputs)
    plain = probabilities(backbone, inputs)
    assert maps.layers.keys() == plain.keys() and len(plain) == 7
    for path, seen in maps.layers.items():
        expected = plain[path][1, :, :, [2, 3]].sum(-1).mean(0)
        torch.testing.assert_close(seen[1].flatten(), expected)
        assert not seen[0].any() and seen.shape[1:] in (GRID, (4, 3)) and seen.dtype == torch.float32


def test_against_other_tokens_it_is_their_share_of_both(
    backbone: Backbone, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    with recording_maps(backbone.unet, [[2]], against=[0]) as maps:
        backbone.predict(*inputs)
    for path, plain in probabilities(backbone, inputs).items():
        expected = (plain[..., 2] / (plain[..., 2] + plain[..., 0])).mean(1)
        torch.testing.assert_close(maps.layers[path].flatten(1), expected)


def test_what_is_computed_and_the_u_net_are_as_without_watching(
    backbone: Backbone, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    before, there = backbone.predict(*inputs), processors(backbone.unet)
    with recording_maps(backbone.unet, ROWS):
        assert torch.equal(backbone.predict(*inputs), before)
        assert all(a is b for a, b in zip(processors(backbone.unet), there, strict=True))
    assert hooks(backbone.unet) == 0

    class Stop(Exception):
        pass

    with pytest.raises(Stop), recording_maps(backbone.unet, ROWS):
        backbone.predict(*inputs)
        raise Stop
    assert hooks(backbone.unet) == 0
    assert all(a is b for a, b in zip(processors(backbone.unet), there, strict=True))
    assert torch.equal(backbone.predict(*inputs), before)


def test_only_the_layers_that_are_named_are_looked_at(
    backbone: Backbone, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    known = cross_attentions(backbone.unet)
    decoder = [path for path in known if path.startswith("up_blocks.1.")]
    with recording_maps(backbone.unet, ROWS, paths=decoder) as maps:
        hooked = [path for path in known if backbone.unet.get_submodule(path)._forward_pre_hooks]
        backbone.predict(*inputs)
    assert list(maps.layers) == hooked == decoder and len(decoder) == 2


def test_a_self_attention_in_the_decoder_knows_the_layers_before_it(
    backbone: Backbone, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    known: list[tuple[int, Tensor | None, Tensor | None]] = []
    layer = backbone.unet.get_submodule("up_blocks.0.attentions.0.transformer_blocks.0.attn1")
    with recording_maps(backbone.unet, ROWS) as maps:
        assert maps.current(GRID) is None and maps.average(GRID) is None
        handle = layer.register_forward_pre_hook(
            lambda module, args: known.append((len(maps.layers), maps.current((4, 3)), maps.average((4, 3))))
        )
        for _ in range(2):
            backbone.predict(*inputs)
        handle.remove()
    (first, now, average), (second, again, so_far) = known
    assert first == second == 3 and average is None  # of the encoder's two blocks and the middle
    assert now is not None and again is not None and so_far is not None
    torch.testing.assert_close(now, again)
    before = [resized(layer, (4, 3)) for layer in list(maps.layers.values())[:3]]
    torch.testing.assert_close(now, torch.stack(before).mean(0))


def test_the_average_is_that_of_all_forwards_on_one_grid(
    backbone: Backbone, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    z, t, context = inputs
    each = []
    with recording_maps(backbone.unet, ROWS) as maps:
        for factor in (1, 2, 3):
            backbone.predict(factor * z, t, context)
            each.append(maps.current(GRID))
    average = maps.average(GRID)
    assert maps.forwards == 3 and average is not None and average.shape == (2, *GRID)
    torch.testing.assert_close(average, torch.stack(each).mean(0))


def test_positions_are_repeated_over_the_rows(
    backbone: Backbone, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    twice = tuple(x.repeat(2, *(1 for _ in x.shape[1:])) for x in inputs)
    with recording_maps(backbone.unet, ROWS) as maps:
        backbone.predict(*twice)
    for seen in maps.layers.values():
        torch.testing.assert_close(seen[:2], seen[2:])
        assert seen[1].all() and not seen[2].any()


def test_a_map_keeps_its_brightness_on_another_grid() -> None:
    maps = torch.rand(2, 8, 6)
    assert resized(maps, (8, 6)) is maps
    for grid in ((4, 3), (16, 12), (5, 7)):
        assert resized(maps, grid).shape == (2, *grid)
        torch.testing.assert_close(resized(torch.full((1, 8, 6), 0.3), grid), torch.full((1, *grid), 0.3))
    torch.testing.assert_close(resized(maps, (4, 3)).mean((1, 2)), maps.mean((1, 2)), rtol=0.1, atol=0)


def test_slicing_and_half_precision_give_the_same_maps(
    tmp_path: Path, backbone: Backbone, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    with recording_maps(backbone.unet, ROWS) as maps:
        backbone.predict(*inputs)
    half = Backbone.load(str(checkpoints.make("tiny", tmp_path)), dtype=torch.bfloat16)
    half.unet.set_attention_slice(1)
    with recording_maps(half.unet, ROWS) as rough:
        half.predict(*inputs)
    for path, seen in rough.layers.items():
        assert seen.dtype == torch.float32
        torch.testing.assert_close(seen, maps.layers[path], rtol=0.1, atol=0.01)


class Doubled(CPAttention):
    """A variant that is seen in every layer after it."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * k, v


def test_cp_attn_and_watching_go_together(backbone: Backbone, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    sites = select(self_attentions(backbone.unet, GRID), Selection("encoder"))
    attachment = attach(backbone.unet, {site.path: Doubled(site) for site in sites})
    try:
        with attachment.blend():
            expected = backbone.predict(*inputs)
            with recording_maps(backbone.unet, ROWS) as maps:
                assert torch.equal(backbone.predict(*inputs), expected)
                changed = maps.current(GRID)
        with recording_maps(backbone.unet, ROWS) as maps:
            backbone.predict(*inputs)
            plain = maps.current(GRID)
        attachment.check()
    finally:
        attachment.detach()
    assert changed is not None and plain is not None and not torch.allclose(changed, plain)
