"""What a paper says of its own method, beyond what the kit checks of every method; on the kit's network."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from kvinv_pl.algorithm.method import Control, Inverted, Scene, naming_grid, sample
from kvinv_pl.attention.cross_attention import cross_attentions
from kvinv_pl.attention.sites import self_attentions
from kvinv_pl.attention.unet import decoder_layers
from kvinv_pl.bench.methods import make
from kvinv_pl.bench.running import sample_edit
from kvinv_pl.errors import UserError
from kvinv_pl.testing.method_checks import SOURCE, scene_for
from kvinv_pl.testing.tiny import CHANNELS, WIDTH, TinyModel

PLAIN = make("plain", "edit")
Imagic: Any = type(make("imagic", "inversion"))


@pytest.fixture
def scene() -> Scene:
    return scene_for(PLAIN)


CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


@pytest.fixture
def three_levels() -> Scene:
    """Of a U-Net like the embedded one: the middle alone attends on the coarsest grid."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            in_channels=CHANNELS, out_channels=CHANNELS, layers_per_block=1, block_out_channels=(8, 8, 8),
            down_block_types=(CROSS[0], CROSS[0], "DownBlock2D"),
            up_block_types=("UpBlock2D", CROSS[1], CROSS[1]),
            attention_head_dim=2, norm_num_groups=4, cross_attention_dim=WIDTH,
        )  # fmt: skip
    z_0 = torch.randn(1, CHANNELS, 4, 16, generator=torch.Generator().manual_seed(0))
    model, sites = TinyModel(), self_attentions(unet, (4, 16))
    model.unet = unet.requires_grad_(False).eval()
    model.self_attentions = tuple(site.path for site in sites)
    model.cross_attentions = tuple(cross_attentions(unet))
    model._grids = {site.tokens: site.grid for site in sites}
    return replace(scene_for(PLAIN, model=model), z_0=z_0)


def inverted(scene: Scene, inversion: Any) -> Tensor:
    return sample_edit(scene, inversion, PLAIN)


def test_differences_below_the_proximal_threshold_are_none(scene: Scene) -> None:
    nothing = inverted(scene, make("proximal", "inversion", quantile=1.0))
    assert torch.allclose(nothing, scene.z_0.expand_as(nothing), atol=1e-5)
    everything = inverted(scene, make("proximal", "inversion", quantile=0.0, until=0))
    assert torch.allclose(everything, inverted(scene, make("negative_prompt", "inversion")), atol=1e-5)

    out = torch.tensor([0.0, 3.0, -1.0, 2.0]).view(1, 1, 1, 4).expand(2, 1, 1, 4)
    branches = torch.stack([torch.zeros_like(out), out])
    for norm, wanted in (("l0", [0.0, 3, 0, 0]), ("l1", [0.0, 1, 0, 0])):
        pulled = make("proximal", "inversion", norm=norm).invert(scene)
        assert pulled.guided(0, branches)[1].flatten().tolist() == [scene.guidance * x for x in wanted]


def test_aligned_inversion_asks_for_the_target_where_it_asked_for_the_source(scene: Scene) -> None:
    same = replace(scene, target=SOURCE, guidance=1.0)
    both = inverted(same, make("aligned", "inversion"))
    assert torch.allclose(both, scene.z_0.expand_as(both), atol=1e-4)
    assert not torch.allclose(inverted(same, make("ddim", "inversion")), both, atol=1e-4)


def test_cross_attention_guidance_brings_the_targets_maps_closer_to_the_sources(scene: Scene) -> None:
    ddim = make("ddim", "inversion").invert(scene)
    led: Any = make("pix2pix_zero", "edit", amount=0.01).control(scene, ddim)
    z = led.before(0, ddim.start.expand(2, -1, -1, -1))
    assert torch.equal(z[:1], ddim.start)
    led.before(0, z)
    assert 0 < led.losses[1] < led.losses[0]


def test_cross_attention_guidance_is_by_the_mean_over_the_heads_of_both_branches(scene: Scene) -> None:
    ddim = make("ddim", "inversion").invert(scene)
    led: Any = make("pix2pix_zero", "edit").control(scene, ddim)
    found = list[Tensor]()

    class Watches(Control):
        attentions = scene.model.cross_attentions

        def attend(self, i: int, at: Any) -> Tensor:
            source, target = at.probabilities(at.q, at.k)[-1]
            found.append((target - source).square().sum() / (2 * len(source)))
            return super().attend(i, at)

    z = ddim.start.expand(2, -1, -1, -1)
    led.before(0, z)
    with scene.model.controlled(0, Watches()):
        scene.model.predict(z, scene.table.timesteps[:1], ddim.contexts(0)[-1:])
    assert led.losses == [pytest.approx(float(sum(found)), rel=1e-4)]


def test_regularised_noise_is_whiter_and_without_rounds_it_is_ddims(scene: Scene) -> None:
    from kvinv_plugins.inversions.noise_regularized import (  # pyright: ignore[reportMissingImports]
        divergence,
        pairwise,
    )

    coarse = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(0.8 * coarse, scale_factor=4)

    def whiter(**rates: float) -> Tensor:
        regularized = make("noise_regularized", "inversion", **rates)
        return regularized.whitened(smooth, torch.Generator().manual_seed(0))

    apart, settled = whiter(divergence=0.0), whiter(pairwise=0.0)
    before, after = (pairwise(x, torch.Generator().manual_seed(1)) for x in (smooth, apart))
    assert after < before and divergence(settled) < divergence(smooth)
    idle = make("noise_regularized", "inversion", rounds=0)
    assert torch.allclose(inverted(scene, idle), inverted(scene, make("ddim", "inversion")), atol=1e-4)


def test_sentences_that_differ_in_nothing_give_no_edit_direction(scene: Scene) -> None:
    about = ("a cat", "the cat")
    source, target = sample_edit(
        scene, make("ddim", "inversion"), make("pix2pix_zero", "edit", sentences=(about, about))
    )
    assert torch.allclose(source, target, atol=1e-5)


def test_plug_and_play_takes_the_layers_of_stable_diffusion_that_are_published() -> None:
    blocks = ("CrossAttnUpBlock2D",) * 3
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32,) * 4, up_block_types=("UpBlock2D", *blocks), cross_attention_dim=8
        )
    layers = decoder_layers([path for path, _ in unet.named_modules()])
    assert len(layers) == 12 and not layers[2][1]
    one = "up_blocks.1.resnets.1.conv2", ["up_blocks.1.attentions.1.transformer_blocks.0.attn1"]
    assert layers[4] == one and sum(len(found) for _, found in layers[4:]) == 8


def test_plug_and_play_gives_the_target_the_sources_features_and_maps_and_leaves_it_its_values(
    scene: Scene,
) -> None:
    class Watched(type(make("plug_and_play", "edit").control(scene, Inverted(scene, scene.z_0)))):
        def convolve(self, i: int, path: str, x: Tensor) -> Tensor:
            given.append(super().convolve(i, path, x))
            return given[-1]

        def attend(self, i: int, at: Any) -> Tensor:
            own = at.read(at.probabilities(at.q, at.k)[:, :1].expand(-1, 2, -1, -1, -1), at.v)
            assert torch.allclose(super().attend(i, at), own, atol=1e-5)
            return own

    given: list[Tensor] = []
    ddim = make("ddim", "inversion").invert(scene)
    control = make("plug_and_play", "edit", features=1.0, self_attention=1.0).control(scene, ddim)
    control.__class__ = Watched
    sample(scene, ddim, control)
    assert len(given) == len(scene.table) and all(torch.equal(x[:, 0], x[:, 1]) for x in given)


def test_words_are_found_on_the_coarsest_grid_that_several_layers_have() -> None:
    stable_diffusion = {(64, 64): 5, (32, 32): 5, (16, 16): 5, (8, 8): 1}
    embedded = {(16, 16): 3, (8, 8): 3, (4, 4): 1}
    assert (naming_grid(stable_diffusion), naming_grid(embedded)) == ((16, 16), (8, 8))
    assert naming_grid({(4, 6): 1, (2, 3): 1}) == (2, 3)


def test_layers_of_the_embedded_model_are_those_that_the_page_names() -> None:
    config = files("kvinv_pl.menagerie") / "weights" / "unet" / "config.json"
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(json.loads(config.read_text(encoding="utf-8")))
    model, sites = TinyModel(), self_attentions(unet, (16, 16))
    model.self_attentions = tuple(site.path for site in sites)
    model.decoder = decoder_layers([path for path, _ in unet.named_modules()])
    sides = {site.path: site.grid[0] for site in sites}
    scene = scene_for(make("masactrl", "edit"), model=model)
    read = make("masactrl", "edit").control(scene, Inverted(scene, scene.z_0)).attentions
    assert [sides[path] for path in read] == [8, 16, 16]
    injected = make("plug_and_play", "edit").control(scene, Inverted(scene, scene.z_0))
    assert injected.convolutions == ("up_blocks.1.resnets.0.conv2",) and len(model.decoder) == 6
    assert [sides[path] for path in injected.attentions] == [8, 8, 16, 16]
    assert naming_grid(Counter(site.grid for site in sites)) == (8, 8)


def word_maps(at: Any, place: int) -> Tensor:
    return at.probabilities(at.q, at.k)[-1].mean(1)[..., place].unflatten(1, at.grid)


def test_masactrl_with_a_word_reads_within_the_masks_of_the_same_step(three_levels: Scene) -> None:
    ddim = make("ddim", "inversion").invert(three_levels)
    options: dict[str, Any] = {"word": "cat", "empty_source": False, "start": 0.0, "threshold": 0.5}
    control = make("masactrl", "edit", **options).control(three_levels, ddim)
    maps, read = list[Tensor](), list[int]()

    class Watched(type(control)):
        def before(self, i: int, z: Tensor) -> Tensor:
            maps.clear()
            return super().before(i, z)

        def attend(self, i: int, at: Any) -> Tensor:
            given = super().attend(i, at)
            if at.cross:
                maps.extend([word_maps(at, 2)] if at.grid == (2, 8) else [])
                return given
            mean = torch.stack(maps).mean(0)
            least, most = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
            masks = F.interpolate(((mean - least) / (most - least) > 0.5)[None].float(), at.grid)[0] > 0.5
            source, target = masks.flatten(1)
            k, v = at.k[:, :1].expand_as(at.k), at.v[:, :1].expand_as(at.v)
            both = (1, 2, len(source), len(source))
            inside, outside = (at.attend(at.q, k, v, side.expand(both)) for side in (source, ~source))
            wanted = torch.where(target[:, None], inside, outside)
            assert torch.allclose(given[:, 1], wanted[:, 1], atol=1e-5)
            read.append(len(maps))
            return given

    control.__class__ = Watched
    sample(three_levels, ddim, control)
    assert len(read) == 3 * len(three_levels.table) and read[:3] == [2, 3, 3]


def test_local_blend_finds_the_words_where_several_layers_do(three_levels: Scene) -> None:
    ddim = make("ddim", "inversion").invert(three_levels)
    options: dict[str, Any] = {"words": ("standing", "running"), "cross": 0.0, "self_attention": 0.0}
    blend = make("prompt_to_prompt", "edit", blend_start=0.0, threshold=0.9999, **options)
    control = blend.control(three_levels, ddim)
    maps, parts = list[Tensor](), list[Tensor]()

    class Watched(type(control)):
        def attend(self, i: int, at: Any) -> Tensor:
            maps.extend([word_maps(at, 3)] if at.cross and at.grid == (2, 8) else [])
            return super().attend(i, at)

        def after(self, i: int, z: Tensor) -> Tensor:
            spread = F.max_pool2d(torch.stack(maps).sum(0)[:, None], 3, 1, 1)
            fitted = F.interpolate(spread, z.shape[-2:])
            parts.append((fitted / fitted.amax((2, 3), keepdim=True) > 0.9999).any(0))
            blended = super().after(i, z)
            assert torch.equal(blended, torch.cat([z[:1], torch.where(parts[-1], z[1:], z[:1])]))
            return blended

    control.__class__ = Watched
    sample(three_levels, ddim, control)
    assert parts and all(part.any() and not part.all() for part in parts)


def test_flexiedit_damps_high_frequencies_in_the_region_alone(scene: Scene) -> None:
    from kvinv_plugins.editors.flexiedit import boxed, damped  # pyright: ignore[reportMissingImports]

    z = scene.z_0
    left = boxed((0.0, 0.0, 0.5, 1.0), z)
    assert left[..., :3].all() and not left[..., 3:].any()
    refined = damped(z, left, 0.7, 0.3, 0)
    assert torch.equal(refined[..., 3:], z[..., 3:]) and not torch.allclose(refined[..., :3], z[..., :3])
    assert torch.allclose(damped(z, left, 1.0, 0.3, 0), z, atol=1e-6)


def test_flexiedit_without_reinversion_is_sampling_from_the_damped_latents(scene: Scene) -> None:
    ddim = make("ddim", "inversion").invert(scene)
    undamped = make("flexiedit", "edit", alpha=1.0, reinversion=0.0).control(scene, ddim)
    found = sample(scene, ddim, undamped)
    assert torch.allclose(found, sample(scene, ddim, Control()), atol=1e-5)
    assert not torch.allclose(found, sample(scene, ddim, make("flexiedit", "edit").control(scene, ddim)))


@pytest.mark.parametrize(
    ("name", "rate", "options"),
    [
        ("imagic", {"text_rate": 0.05}, {"text_steps": 15, "network_steps": 0}),
        ("imagic", {"network_rate": 3e-3}, {"text_steps": 0, "network_steps": 15}),
        ("dreambooth", {"rate": 0.02}, {"steps": 15}),
        ("textual_inversion", {"rate": 0.05}, {"steps": 15, "batch": 1}),
        ("custom_diffusion", {"rate": 0.02}, {"steps": 15, "batch": 1}),
    ],
)
def test_what_is_learned_of_a_picture_denoises_it_better(
    name: str, rate: dict[str, float], options: dict[str, Any], scene: Scene
) -> None:
    def losses(rate: dict[str, float]) -> list[float]:
        found: Any = make(name, "inversion", **options, **rate).invert(scene)
        assert bool(found.weights) == (name != "textual_inversion" and bool(options.get("network_steps", 1)))
        return [*found.losses[0], *found.losses[1]] if name == "imagic" else found.losses

    learned, never = losses(rate), losses(dict.fromkeys(rate, 0.0))  # of the same draws
    assert len(learned) == 15 and learned[0] == never[0] and sum(learned[5:]) < sum(never[5:])


def test_textual_inversion_learns_the_subjects_word_and_changes_nothing_else(scene: Scene) -> None:
    brief = {"steps": 3, "batch": 1}
    found = make("textual_inversion", "inversion", rate=0.1, **brief).invert(scene)
    moved = (found.read != scene.contexts[1:]).any(-1)
    assert not found.weights and moved[0].nonzero().flatten().tolist() == [2]  # < a cat
    assert torch.equal(moved[0], moved[1]) and torch.equal(found.read[0, 2], found.read[1, 2])
    unmoved = make("textual_inversion", "inversion", rate=0.0, **brief).invert(scene)
    assert torch.equal(unmoved.read, scene.contexts[1:])
    empty = replace(scene, source="")
    assert make("textual_inversion", "inversion", word="cat", **brief).invert(empty).losses != found.losses


def test_a_batch_of_learning_is_the_mean_over_its_draws(scene: Scene) -> None:
    losses = {
        batch: make("textual_inversion", "inversion", rate=0.0, steps=6 // batch, batch=batch)
        .invert(scene)
        .losses
        for batch in (1, 3)
    }
    assert losses[3] == pytest.approx([sum(losses[1][:3]) / 3, sum(losses[1][3:]) / 3])


@pytest.mark.parametrize("name", ["textual_inversion", "custom_diffusion"])
def test_a_batch_learns_the_same_in_one_forward_or_in_several(
    name: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, rows = scene.model.predict, list[int]()

    def counted(z: Tensor, *given: Tensor) -> Tensor:
        rows.append(len(z))
        return predict(z, *given)

    monkeypatch.setattr(scene.model, "predict", counted)
    forwards, found = dict[int, list[int]](), dict[int, Any]()
    for micro_batch in (1, 2, 5):  # 2 leaves one over, 5 is more than there are
        rows.clear()
        method = make(name, "inversion", rate=0.01, steps=2, batch=3, micro_batch=micro_batch)
        found[micro_batch] = method.invert(scene)
        forwards[micro_batch] = [*rows]
    assert forwards == {1: [1] * 6, 2: [2, 1] * 2, 5: [3] * 2}
    for micro_batch in (2, 5):
        assert found[micro_batch].losses == pytest.approx(found[1].losses, rel=1e-5)
        torch.testing.assert_close(found[micro_batch].read, found[1].read, rtol=1e-3, atol=1e-4)


def test_custom_diffusion_learns_keys_and_values_of_words_and_a_word_before_the_subject(scene: Scene) -> None:
    found = make("custom_diffusion", "inversion", steps=3, batch=1, rate=0.1).invert(scene)
    assert (found.scene.source, found.scene.target) == ("a ktn cat standing", "a ktn cat running")
    wanted = {f"{path}.{name}.weight" for path in scene.model.cross_attentions for name in ("to_k", "to_v")}
    assert found.weights.keys() == wanted
    assert all(not torch.equal(each, scene.model.weights[path]) for path, each in found.weights.items())
    moved = (found.read != scene.model.embed(["a ktn cat standing", "a ktn cat running"])).any(-1)
    assert moved.nonzero()[:, 1].tolist() == [2, 2]
    asked = list[Scene]()

    class Asks:  # an edit is given the prompts as they have become
        guidance, empty_source = None, False

        def control(self, scene: Scene, inverted: Inverted) -> Control:
            asked.append(scene)
            return Control()

    sample_edit(scene, make("custom_diffusion", "inversion", steps=1, batch=1), Asks())
    assert asked[0].target == "a ktn cat running"


def test_imagic_learns_as_its_paper_does_with_stable_diffusion() -> None:
    imagic = Imagic()
    assert (imagic.text_steps, imagic.text_rate) == (1000, 2e-3)
    assert (imagic.network_steps, imagic.network_rate) == (1500, 5e-7)


def test_imagic_gives_the_target_the_sources_embedding_as_far_as_eta_says(scene: Scene) -> None:
    def rows(eta: float, **steps: int) -> Tensor:
        return inverted(scene, make("imagic", "inversion", eta=eta, **{**Imagic.brief, **steps}))

    source, target = rows(0.0)
    assert torch.equal(source, target)
    source, target = rows(0.7)
    assert not torch.allclose(source, target)
    unknown_words = rows(1.0, text_steps=0, network_steps=0)[1:]
    noise = torch.randn(scene.z_0.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(unknown_words, sample(scene, Inverted(scene, noise), Control())[1:], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("proximal", {"quantile": 2.0}, "quantile: expected 0 to 1, got 2.0"),
        ("proximal", {"norm": "l2"}, "norm: expected l0 or l1, got 'l2'"),
        ("imagic", {"text_steps": -1}, "text_steps: expected 0 or more, got -1"),
        ("dreambooth", {"rank": 0}, "rank: expected 1 or more, got 0"),
        ("textual_inversion", {"batch": 0}, "batch: expected 1 or more, got 0"),
        ("textual_inversion", {"micro_batch": 0}, "micro_batch: expected 1 or more, got 0"),
        ("custom_diffusion", {"steps": 0}, "steps: expected 1 or more, got 0"),
        ("flexiedit", {"region": (0.5, 0.0, 0.2, 1.0)}, "region: expected left < right"),
        ("pix2pix_zero", {"sentences": ((), ("a",))}, "sentences: expected some about the source"),
        ("plug_and_play", {"features": 2}, "features: expected a share of the steps, 0 to 1, got 2"),
        ("prompt_to_prompt", {"cross": -1}, "cross: expected a share of the steps, 0 to 1, got -1"),
        ("flexiedit", {"reinversion": 1.5}, "reinversion: expected a share of the steps"),
        ("masactrl", {"start": 4}, "start: expected a share of the steps, 0 to 1, got 4"),
        ("plug_and_play", {"layer": 4}, "layer: expected 0 to 3, got 4"),
        ("flexiedit", {"layer": 7}, "layer: expected 0 to 6, got 7"),
    ],
)
def test_what_a_method_cannot_be_made_with_is_said(
    scene: Scene, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(name, "edit", "inversion", **options).control(scene, None)


def test_a_subject_that_cannot_be_told_is_asked_for(scene: Scene) -> None:
    for name in ("textual_inversion", "custom_diffusion"):
        with pytest.raises(UserError, match="give it by the method's option word"):
            make(name, "inversion").invert(replace(scene, source=""))
        with pytest.raises(UserError, match="'dog' is not in the prompt 'a cat running'"):
            make(name, "inversion", word="dog").invert(scene)
