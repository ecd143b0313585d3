import re
from typing import Any

import pytest
import torch
from checkpoints import tiny_unet
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from kvinv_pl.attention.sites import Selection, Site, select, self_attentions
from kvinv_pl.errors import UserError

LATENT = (16, 24)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return tiny_unet()


@pytest.fixture(scope="module")
def sites(unet: UNet2DConditionModel) -> list[Site]:
    return self_attentions(unet, LATENT)


def blocks(chosen: list[Site]) -> list[str]:
    return sorted({re.sub(r"\.?attentions.*", "", site.path) for site in chosen})


def test_every_attn1_is_a_site_and_no_attn2_is(unet: UNet2DConditionModel, sites: list[Site]):
    expected = [name for name, _ in unet.named_modules() if name.endswith(".attn1")]
    assert sorted(site.path for site in sites) == sorted(expected)
    assert [site.path.split(".")[0] for site in sites] == ["down_blocks"] * 3 + ["mid_block"] + [
        "up_blocks"
    ] * 6


@pytest.mark.parametrize("latent", [(16, 24), (24, 16), (13, 21), (8, 64)])
@pytest.mark.parametrize("changes", [{}, {"use_linear_projection": True}])
def test_grid_dim_and_heads_are_those_of_a_real_forward(latent: tuple[int, int], changes: dict[str, Any]):
    unet = tiny_unet(**changes)
    seen: dict[str, tuple[int, int]] = {}

    def remember(name: str):
        return lambda module, args, output: seen.update({name: tuple(args[0].shape[1:])})

    handles = [
        module.to_k.register_forward_hook(remember(name))  # type: ignore[union-attr]
        for name, module in unet.named_modules()
        if name.endswith(".attn1")
    ]
    with torch.no_grad():
        unet(torch.zeros(1, 4, *latent), 1, torch.zeros(1, 3, 8))
    for handle in handles:
        handle.remove()

    sites = self_attentions(unet, latent)
    assert {site.path: (site.tokens, site.dim) for site in sites} == seen
    assert sites[0].grid == latent
    assert {site.heads for site in sites} == {2}
    assert {site.slots for site in sites} == {1}


def test_a_wide_grid_and_a_tall_grid_of_as_many_tokens_are_told_apart(unet: UNet2DConditionModel):
    assert self_attentions(unet, (16, 24))[1].grid == (8, 12)
    assert self_attentions(unet, (24, 16))[1].grid == (12, 8)


def test_attention_on_the_map_itself_and_double_self_attention_are_sites():
    unet = tiny_unet(
        down_block_types=("AttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        dual_cross_attention=False,
    )
    first = self_attentions(unet, LATENT)[0]
    assert (first.path, first.grid) == ("down_blocks.0.attentions.0", LATENT)


def test_finding_sites_touches_neither_weights_nor_random_state(unet: UNet2DConditionModel):
    weights = {name: (p.data_ptr(), p._version) for name, p in unet.named_parameters()}
    processors = dict(unet.attn_processors)
    state = torch.get_rng_state()
    self_attentions(unet, (32, 16))  # a grid that was not met before
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: (p.data_ptr(), p._version) for name, p in unet.named_parameters()} == weights
    assert all(unet.attn_processors[name] is p for name, p in processors.items())
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_what_was_found_is_remembered_by_the_configuration_and_the_grid_and_cannot_be_changed(
    unet: UNet2DConditionModel, sites: list[Site], monkeypatch: pytest.MonkeyPatch
):
    self_attentions(unet, LATENT).clear()
    other = self_attentions(tiny_unet(attention_head_dim=4), LATENT)
    assert {site.heads for site in other} == {4} and {site.heads for site in sites} == {2}
    monkeypatch.setattr(UNet2DConditionModel, "forward", None)
    assert self_attentions(tiny_unet(), LATENT) == sites


def test_a_unet_with_further_conditions_is_refused_by_the_name_of_the_condition():
    unet = tiny_unet(class_embed_type="timestep")
    with pytest.raises(UserError, match=r"class_embed_type='timestep'"):
        self_attentions(unet, LATENT)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("encoder", ["down_blocks.0", "down_blocks.1", "down_blocks.2"]),
        ("middle", ["mid_block"]),
        ("decoder", ["up_blocks.1", "up_blocks.2", "up_blocks.3"]),
        (None, ["up_blocks.1", "up_blocks.2", "up_blocks.3"]),
        (["middle", "encoder"], ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block"]),
    ],
)
def test_presets_are_parts_of_the_unet(sites: list[Site], preset: Any, expected: list[str]):
    assert blocks(select(sites, Selection(target_modules=preset))) == expected


def test_all_is_everything_and_the_default_is_the_decoder(sites: list[Site]):
    assert select(sites, Selection(target_modules="all")) == sites
    assert select(sites, Selection()) == select(sites, Selection(target_modules="decoder"))


def test_a_string_is_a_regex_for_the_whole_path(sites: list[Site]):
    assert blocks(select(sites, Selection(target_modules=r"(up|down)_blocks\.2\..*"))) == [
        "down_blocks.2",
        "up_blocks.2",
    ]
    with pytest.raises(UserError, match="no self-attention matches"):
        select(sites, Selection(target_modules="up_blocks"))


def test_a_list_holds_paths_and_ends_of_paths(sites: list[Site]):
    assert select(sites, Selection(target_modules=["attn1"])) == sites
    assert select(sites, Selection(target_modules=[sites[4].path])) == [sites[4]]
    assert select(sites, Selection(target_modules=["attentions.1.transformer_blocks.0.attn1"])) == [
        site for site in sites if ".attentions.1." in site.path
    ]


@pytest.mark.parametrize(
    "exclude", [r"up_blocks\.3\..*", ["attentions.1.transformer_blocks.0.attn1"], "middle"]
)
def test_excluded_modules_are_left_out(sites: list[Site], exclude: Any):
    left_out = set(select(sites, Selection("all", exclude_modules=None))) - set(
        select(sites, Selection("all", exclude))
    )
    kind = exclude if exclude != "middle" else r"mid_block\..*"
    assert left_out == set(select(sites, Selection(kind)))


@pytest.mark.parametrize("targets", ["all", ["attn1"]])
def test_layers_to_transform_counts_blocks(sites: list[Site], targets: Any):
    assert blocks(select(sites, Selection(targets, layers_to_transform=1))) == [
        "down_blocks.1",
        "up_blocks.1",
    ]
    chosen = select(sites, Selection(targets, layers_to_transform=[0, 3]))
    assert blocks(chosen) == ["down_blocks.0", "up_blocks.3"]


def test_layers_to_transform_works_within_a_preset(sites: list[Site]):
    assert blocks(select(sites, Selection("decoder", layers_to_transform=[1, 2]))) == [
        "up_blocks.1",
        "up_blocks.2",
    ]


def test_layers_pattern_says_what_is_counted(sites: list[Site]):
    chosen = select(sites, Selection(["attn1"], layers_to_transform=2, layers_pattern="up_blocks"))
    assert blocks(chosen) == ["up_blocks.2"]
    chosen = select(sites, Selection("all", layers_to_transform=1, layers_pattern=["attentions"]))
    assert {site.path.split("attentions.")[1][0] for site in chosen} == {"1"}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(r"up_blocks\..*", layers_to_transform=1), r"regex target_modules='up_blocks"),
        (Selection("all", layers_pattern="up_blocks"), r"give that too"),
        (Selection("all", layers_to_transform=[]), r"chooses nothing"),
        (Selection([]), r"target_modules=\[\] chooses nothing"),
        (Selection("("), r"'\(' is not a regular expression"),
        (Selection("all", exclude_modules="["), r"'\[' is not a regular expression"),
    ],
)
def test_a_contradictory_selection_is_refused(sites: list[Site], selection: Selection, message: str):
    with pytest.raises(UserError, match=message):
        select(sites, selection)


@pytest.mark.parametrize(
    "selection",
    [
        Selection(["to_k"]),
        Selection("dekoder"),
        Selection("all", "all"),
        Selection("middle", layers_to_transform=0),
    ],
)
def test_no_match_lists_what_could_have_matched(sites: list[Site], selection: Selection):
    with pytest.raises(UserError) as error:
        select(sites, selection)
    assert all(site.path in str(error.value) for site in sites)
    assert "encoder, middle, decoder, all" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("most", "largest"), [(100, (16, 24)), (20, (16, 24)), (19, (8, 12)), (5, (4, 6))])
def test_a_bound_on_the_grid_keeps_sites_of_at_most_its_square_of_tokens(
    sites: list[Site], most: int, largest: tuple[int, int]
):
    kept, every = (select(sites, Selection("all", max_grid=bound)) for bound in (most, None))
    assert kept == [site for site in every if site.tokens <= most**2]
    assert max(site.grid for site in kept) == largest


def test_a_bound_that_leaves_nothing_says_how_large_it_would_have_to_be(sites: list[Site]):
    with pytest.raises(UserError, match=r"max_grid: expected at least 10, got 9: .* 8 x 12 tokens"):
        select(sites, Selection("up_blocks.2.attentions.*attn1", max_grid=9))
    with pytest.raises(UserError, match="max_grid: expected 1 or more, got 0"):
        select(sites, Selection("all", max_grid=0))
