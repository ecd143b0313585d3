from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, cast

import pytest
import torch
from checkpoints import tiny_unet
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]
from kvinv_plugins.low_rank import LowRank  # pyright: ignore[reportMissingImports]
from kvinv_plugins.recorded import Recorded  # pyright: ignore[reportMissingImports]
from kvinv_plugins.v_only import VOnly  # pyright: ignore[reportMissingImports]
from peft import LoraConfig
from torch import Tensor, nn

from kvinv_pl.attention import CPAttention, Site, self_attentions
from kvinv_pl.attention.attachment import Attachment, attach
from kvinv_pl.errors import UserError

LATENT = (8, 16)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_unet()


@cache
def sites() -> list[Site]:
    return self_attentions(tiny_unet(), LATENT)


def variants(slots: int = 1, make: Any = FullKV) -> dict[str, CPAttention]:
    return {site.path: make(replace(site, slots=slots)) for site in sites()}


def shaken(psi: dict[str, CPAttention], seed: int = 1) -> dict[str, CPAttention]:
    """Psi away from its start, as tuning leaves it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for cp in psi.values():
            for p in cp.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.5)
    return psi


def inputs(rows: int, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, 4, *LATENT, generator=generator)
    return z, torch.arange(rows) * 7 + 3, torch.randn(rows, 5, 8, generator=generator)


def run(unet: UNet2DConditionModel, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    z, t, prompt = (x.to(unet.dtype) if x.is_floating_point() else x for x in rows)
    return unet(z, t, prompt).sample


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"use_linear_projection": True}])
@pytest.mark.parametrize("start", ["zeros", "noise", "source"])
def test_attached_at_identity_the_unet_is_the_bare_unet_bit_for_bit(changes: dict[str, Any], start: Any):
    unet = tiny_unet(**changes)
    bare = run(unet, inputs(4))
    attachment = attach(unet, variants(slots=2, make=lambda site: FullKV(site, start=start)))
    assert torch.equal(run(unet, inputs(4)), bare)
    with attachment.blend():
        assert torch.equal(run(unet, inputs(4)), bare)
    with attachment.blend(record=True) as kv, attachment.observing() as own:
        assert torch.equal(run(unet, inputs(4)), bare)
    assert not kv and len(own) == 10


def test_outside_any_mode_psi_has_no_effect(unet: UNet2DConditionModel):
    bare = run(unet, inputs(2))
    attachment = attach(unet, shaken(variants()))
    assert torch.equal(run(unet, inputs(2)), bare)
    with attachment.blend():
        assert not close(run(unet, inputs(2)), bare)
    with pytest.raises(RuntimeError, match="stop"), attachment.blend():
        raise RuntimeError("stop")
    assert torch.equal(run(unet, inputs(2)), bare)


def test_detach_restores_the_very_same_processors(unet: UNet2DConditionModel):
    unet.set_attn_processor(AttnProcessor())  # not what a fresh U-Net would get
    before = dict(unet.attn_processors)
    attachment = attach(unet, shaken(variants()))
    assert sum(unet.attn_processors[name] is not processor for name, processor in before.items()) == 10
    attachment.detach()
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())
    with pytest.raises(UserError, match="detached"):
        attachment.check()


def test_detached_within_a_mode_it_stays_off(unet: UNet2DConditionModel):
    bare = run(unet, inputs(1))
    attachment = attach(unet, shaken(variants()))
    with attachment.blend():
        attachment.detach()
        assert torch.equal(run(unet, inputs(1)), bare)
    attach(unet, variants()).detach()


def test_processors_are_plain_objects_and_the_unet_owns_no_psi(unet: UNet2DConditionModel):
    names = [name for name, _ in unet.named_parameters()]
    attach(unet, variants())
    assert not any(isinstance(processor, nn.Module) for processor in unet.attn_processors.values())
    assert [name for name, _ in unet.named_parameters()] == names


def test_frozen_with_what_was_recorded_is_blend_bit_for_bit(unet: UNet2DConditionModel):
    attachment = attach(unet, shaken(variants(slots=2)))
    with attachment.blend():
        blend = run(unet, inputs(4))
    with attachment.blend(record=True) as kv:
        assert torch.equal(run(unet, inputs(4)), blend)
    with attachment.frozen(kv):
        assert torch.equal(run(unet, inputs(4)), blend)
    assert all(
        k.shape == v.shape == (2, 2, cp.site.tokens, cp.site.dim)
        for (k, v), cp in zip(kv.values(), attachment.psi.values(), strict=True)
    )
    assert not any(x.requires_grad for pair in kv.values() for x in pair)


@pytest.mark.parametrize("edits", [1, 2, 3])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("slots", [1, 2])
def test_frozen_serves_several_edits_each_as_if_it_were_alone(
    unet: UNet2DConditionModel, edits: int, branches: int, slots: int
):
    attachment = attach(unet, shaken(variants(slots=slots)))
    with attachment.blend(record=True) as kv:
        run(unet, inputs(branches * slots))
    each = [inputs(2 * slots, seed=10 + edit) for edit in range(edits)]  # uncond slots, then cond slots
    with attachment.frozen(kv):
        alone = torch.cat([run(unet, one) for one in each])
        together = run(unet, cast(Any, tuple(torch.cat(part) for part in zip(*each, strict=True))))
    assert close(together, alone)


def test_sharpened_edits_attend_as_if_k_bar_were_so_many_times_as_long(unet: UNet2DConditionModel):
    """The scores of Eq. 2 are linear in K-bar; Eq. 1 on its own is left alone."""
    attachment = attach(unet, shaken(variants()))
    with attachment.blend(record=True) as kv:
        source = run(unet, inputs(2))
    with attachment.frozen({path: (2.5 * k, v) for path, (k, v) in kv.items()}):
        longer = run(unet, inputs(2))
    with attachment.editing(2.5):
        with attachment.frozen(kv):
            assert close(run(unet, inputs(2)), longer) and not close(longer, source)
        with attachment.blend():
            assert torch.equal(run(unet, inputs(2)), source)
    with attachment.editing(1.0), attachment.frozen(kv):
        assert torch.equal(run(unet, inputs(2)), source)


def test_frozen_gives_uncond_and_cond_their_own_keys(unet: UNet2DConditionModel):
    attachment = attach(unet, shaken(variants()))
    with attachment.blend(record=True) as kv:
        source = run(unet, inputs(2))
    z, t, prompt = inputs(2)
    with attachment.frozen(kv):
        twice = run(unet, (z.repeat(2, 1, 1, 1), t.repeat(2), prompt.repeat(2, 1, 1)))
    assert close(twice, source.repeat(2, 1, 1, 1))
    swapped = {path: (k.flip(0), v.flip(0)) for path, (k, v) in kv.items()}
    with attachment.frozen(swapped):
        assert not close(run(unet, inputs(2)), source)


def test_frozen_needs_exactly_the_attached_sites_and_their_shapes(unet: UNet2DConditionModel):
    attachment = attach(unet, variants(slots=2))
    with attachment.blend(record=True) as kv:
        run(unet, inputs(4))
    path = next(iter(kv))
    with (
        pytest.raises(UserError, match=rf"missing: \['{path}'\]"),
        attachment.frozen({p: kv[p] for p in kv if p != path}),
    ):
        pass
    with (
        pytest.raises(UserError, match=r"not attached: \['elsewhere'\]"),
        attachment.frozen({**kv, "elsewhere": kv[path]}),
    ):
        pass
    with attachment.frozen(kv), pytest.raises(UserError, match=r"guidance branches of the tuning"):
        run(unet, inputs(2))  # one branch, but two are stored
    one_slot = {path: (k[:, :1], v[:, :1]) for path, (k, v) in kv.items()}
    with attachment.frozen(one_slot), pytest.raises(UserError, match=r"cannot serve a forward of \(2, 2, "):
        run(unet, inputs(4))


def test_stored_half_precision_is_cast(unet: UNet2DConditionModel):
    attachment = attach(unet, shaken(variants()))
    with attachment.blend(record=True) as kv:
        source = run(unet, inputs(2))
    with attachment.frozen({path: (k.half(), v.half()) for path, (k, v) in kv.items()}):
        assert torch.allclose(run(unet, inputs(2)), source, atol=1e-2)


def test_slots_do_not_see_each_other(unet: UNet2DConditionModel):
    psi = shaken(variants(slots=3))
    z, t, prompt = inputs(6)
    attachment = attach(unet, psi)
    with attachment.blend():
        together = run(unet, (z, t, prompt))
    attachment.detach()
    for slot in range(3):
        alone = variants()
        for path, cp in alone.items():
            cp.load_state_dict({name: p[slot : slot + 1] for name, p in psi[path].state_dict().items()})
        attachment = attach(unet, alone)
        with attachment.blend():
            assert close(run(unet, (z[slot::3], t[slot::3], prompt[slot::3])), together[slot::3])
        attachment.detach()


def test_gradient_reaches_every_parameter_of_every_slot(unet: UNet2DConditionModel):
    psi = shaken(variants(slots=2))
    with attach(unet, psi).blend():
        run(unet, inputs(4)).square().sum().backward()
    for cp in psi.values():
        for p in cp.parameters():
            assert p.grad is not None and (p.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(p.grad is None for p in unet.parameters())


def test_gradient_of_one_slot_does_not_reach_another(unet: UNet2DConditionModel):
    psi = shaken(variants(slots=2))
    with attach(unet, psi).blend():
        run(unet, inputs(4))[0::2].sum().backward()
    for cp in psi.values():
        for p in cp.parameters():
            assert p.grad is not None and p.grad[0].any() and not p.grad[1].any()


def test_gradient_checkpointing_changes_no_gradient(unet: UNet2DConditionModel):
    gradients: list[list[Tensor]] = []
    for switch in (unet.disable_gradient_checkpointing, unet.enable_gradient_checkpointing):
        switch()
        psi = shaken(variants())
        attachment = attach(unet, psi)
        with attachment.blend():
            run(unet.train(), inputs(2)).square().sum().backward()
        attachment.detach()
        gradients.append([cast(Tensor, p.grad) for cp in psi.values() for p in cp.parameters()])
    assert all(close(a, b) for a, b in zip(*gradients, strict=True))


def test_a_bf16_unet_works_with_fp32_psi(unet: UNet2DConditionModel):
    unet = cast(Any, unet).to(torch.bfloat16)
    bare = run(unet, inputs(2))
    psi = variants()
    attachment = attach(unet, psi)
    with attachment.blend():
        assert torch.equal(run(unet, inputs(2)), bare)
    shaken(psi)
    with attachment.blend(record=True) as kv:
        out = run(unet, inputs(2))
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {x.dtype for pair in kv.values() for x in pair} == {torch.bfloat16}
    assert {cast(Tensor, p.grad).dtype for cp in psi.values() for p in cp.parameters()} == {torch.float32}


@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.parametrize("make", [FullKV, VOnly, LowRank, Recorded])
def test_a_lora_keeps_its_effect_and_psi_stays_trainable(
    unet: UNet2DConditionModel, make: type[CPAttention], lora_first: bool
):
    bare, before = run(unet, inputs(2)), dict(unet.attn_processors)
    psi = variants(make=make)

    def add_lora() -> None:
        torch.manual_seed(3)
        lora = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        unet.add_adapter(lora)

    steps: list[Callable[[], Any]] = [add_lora, lambda: attach(unet, psi)]
    results = [step() for step in (steps if lora_first else steps[::-1])]
    attachment = next(result for result in results if isinstance(result, Attachment))
    attachment.check()
    with_lora = run(unet, inputs(2))
    assert not close(with_lora, bare)
    with attachment.blend():
        assert torch.equal(run(unet, inputs(2)), with_lora)
    shaken(psi)
    with attachment.blend():
        run(unet, inputs(2)).square().sum().backward()
    assert all(p.requires_grad and cast(Tensor, p.grad).any() for cp in psi.values() for p in cp.parameters())
    assert [site.path for site in self_attentions(unet, LATENT)] == list(psi)
    attachment.detach()
    assert torch.equal(run(unet, inputs(2)), with_lora)
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())


@pytest.mark.parametrize(
    ("meddle", "cause"),
    [
        (
            lambda unet: unet.set_attention_slice("max"),
            "SlicedAttnProcessor is there instead, as after set_attention_slice",
        ),
        (
            lambda unet: unet.fuse_qkv_projections(),
            "FusedAttnProcessor2_0 is there instead, as after fuse_qkv_projections",
        ),
        (
            lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
            "AttnProcessor2_0 is there instead, as after set_attn_processor",
        ),
        (
            lambda unet: setattr(unet.mid_block.attentions[0].transformer_blocks[0], "attn1", nn.Identity()),
            "replaced by a Identity",
        ),
        (lambda unet: setattr(unet, "mid_block", None), "no longer in the U-Net"),
    ],
)
def test_whoever_removes_our_processors_is_named(
    unet: UNet2DConditionModel, meddle: Callable[[Any], None], cause: str
):
    attachment = attach(unet, variants())
    attachment.check()
    meddle(unet)
    nothing = {path: (torch.zeros(1), torch.zeros(1)) for path in attachment.psi}
    for look in (attachment.check, attachment.blend().__enter__, attachment.frozen(nothing).__enter__):
        with pytest.raises(UserError, match=cause):
            look()


def test_what_others_put_there_survives_detach(unet: UNet2DConditionModel):
    attachment = attach(unet, variants())
    unet.set_attention_slice("max")
    theirs = dict(unet.attn_processors)
    attachment.detach()
    assert all(unet.attn_processors[name] is processor for name, processor in theirs.items())


def test_our_processors_coming_back_later_are_off(unet: UNet2DConditionModel):
    bare = run(unet, inputs(1))
    attachment = attach(unet, shaken(variants()))
    unet.fuse_qkv_projections()
    attachment.detach()
    unet.unfuse_qkv_projections()
    assert torch.equal(run(unet, inputs(1)), bare)


class Custom(nn.Module):
    """A processor with an effect of its own."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def test_what_does_not_fit_is_refused_and_changes_nothing(unet: UNet2DConditionModel):
    psi = variants()
    path, cp = next(iter(psi.items()))
    before = dict(unet.attn_processors)
    wrong: list[tuple[Mapping[str, CPAttention], str]] = [
        ({}, "at least one site"),
        (
            {**psi, "mid_block.resnets.0": FullKV(replace(cp.site, path="mid_block.resnets.0"))},
            "not an attention layer",
        ),
        ({**psi, "nowhere": cp}, "'nowhere' is not an attention layer"),
        ({**psi, path: FullKV(replace(cp.site, dim=cp.site.dim * 2))}, f"does not fit {path}"),
        ({**psi, path: FullKV(replace(cp.site, slots=5))}, r"one number of slots at all sites, got \[1, 5\]"),
    ]
    for given, message in wrong:
        with pytest.raises(UserError, match=message):
            attach(unet, given)
        assert all(unet.attn_processors[name] is processor for name, processor in before.items())
    attach(unet, psi)
    with pytest.raises(UserError, match=r"attached to .* already: detach it first"):
        attach(unet, psi)


def test_a_processor_with_an_effect_of_its_own_is_not_dropped(unet: UNet2DConditionModel):
    cast(Any, unet.mid_block).attentions[0].transformer_blocks[0].attn1.set_processor(Custom())
    with pytest.raises(UserError, match="has a Custom, whose effect CP-attn would silently drop"):
        attach(unet, variants())


def test_latents_of_another_size_and_rows_that_slots_do_not_divide_are_refused(unet: UNet2DConditionModel):
    attachment = attach(unet, variants(slots=2))
    with (
        attachment.blend(),
        pytest.raises(UserError, match=r"expected a multiple of the 2 slots, got 3 rows"),
    ):
        run(unet, inputs(3))
    z, t, prompt = inputs(2)
    with (
        attachment.blend(),
        pytest.raises(UserError, match=r"expected 128 tokens \(a grid of \(8, 16\)\), got 256"),
    ):
        run(unet, (z.repeat(1, 1, 2, 1), t, prompt))


@pytest.mark.parametrize("edits", [1, 3])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("slots", [1, 2])
def test_replayed_beside_its_edits_the_source_gives_what_would_have_been_stored(
    unet: UNet2DConditionModel, edits: int, branches: int, slots: int
):
    attachment = attach(unet, shaken(variants(slots=slots)))
    source = inputs(branches * slots)
    each = [inputs(2 * slots, seed=10 + edit) for edit in range(edits)]
    rows = cast(Any, tuple(torch.cat(part) for part in zip(*each, strict=True)))
    with attachment.blend(record=True) as kv:
        alone = run(unet, source)
    with attachment.frozen(kv):
        frozen = run(unet, rows)
    projected = set[int]()
    hooks = [
        layer.register_forward_hook(lambda module, given, out: projected.add(len(out)))
        for path in attachment.psi
        for layer in (unet.get_submodule(f"{path}.to_k"), unet.get_submodule(f"{path}.to_v"))
    ]
    with attachment.replaying(branches):
        both = run(unet, cast(Any, tuple(torch.cat(part) for part in zip(source, rows, strict=True))))
    for hook in hooks:
        hook.remove()
    assert close(both, torch.cat([alone, frozen]))
    assert projected == {branches * slots}  # the edits' own K and V are nobody's
    assert not close(run(unet, rows), frozen)


def test_replayed_rows_that_are_no_whole_edits_are_refused(unet: UNet2DConditionModel):
    with (
        attach(unet, variants()).replaying(2),
        pytest.raises(UserError, match="guidance branches of the tuning"),
    ):
        run(unet, inputs(3))


class NoForward(CPAttention):
    """Forgets Eq. 1."""


class OneResult(CPAttention):
    """Forgets V-bar."""

    def forward(self, k: Tensor, v: Tensor) -> Any:
        return k


class Transposed(CPAttention):
    """Returns another shape."""

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v.transpose(2, 3)


class Whole(CPAttention):
    """Returns whole numbers."""

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k.long(), v


class Listed(CPAttention):
    """Returns what is no tensor."""

    def forward(self, k: Tensor, v: Tensor) -> Any:
        return k, [v]


class Merged(CPAttention):
    """Returns another shape from Eq. 2."""

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sdpa: Any) -> Tensor:
        return sdpa(q, k, v).flatten(0, 1)


class Around(CPAttention):
    """Returns what the variant inside it does, as Masked."""

    inside: type[CPAttention] = Transposed

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.inner = self.inside(site)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(k, v)


class AroundOne(Around):
    """The same around one that forgets V-bar."""

    inside = OneResult


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (NoForward, r"NoForward must define forward\(k, v\)"),
        (Whole, r"Whole.forward returned torch.int64 at .*expected a tensor of floating point"),
        (Listed, r"Listed.forward returned list at .*expected a tensor of floating point"),
        (OneResult, r"OneResult.forward: expected \(k_bar, v_bar\), got a Tensor"),
        (
            Transposed,
            r"Transposed.forward returned the shape \(1, 1, 8, 128\).*expected \(1, 1, 128, 8\)",
        ),
        (Around, r"Around\(Transposed\).forward returned the shape \(1, 1, 8, 128\)"),
        (AroundOne, r"AroundOne\(OneResult\).forward: expected \(k_bar, v_bar\), got a Tensor"),
        (Merged, r"Merged.attend returned the shape \(1, 128, 8\).*expected \(1, 1, 128, 8\)"),
    ],
)
def test_a_variant_that_returns_something_else_is_named(
    unet: UNet2DConditionModel, make: type[CPAttention], message: str
):
    with attach(unet, variants(make=make)).blend(), pytest.raises(UserError, match=message):
        run(unet, inputs(1))


class Half(CPAttention):
    """Lets every query see the first half of the keys, in one of several manners."""

    manner: str = "bool"

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k.double(), v.double()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sdpa: Any) -> Tensor:
        half = self.site.tokens // 2
        if self.manner == "cut":
            return sdpa(q, k[:, :, :half], v[:, :, :half])
        seen = torch.arange(self.site.tokens) < half
        if self.manner == "bool":
            return sdpa(q, k, v, mask=seen)
        return sdpa(
            q, k, v, mask=torch.where(seen, 0.0, float("-inf")).expand(self.site.slots, self.site.tokens, -1)
        )


def test_attend_may_mask_or_cut_the_keys_in_blend_and_in_frozen(unet: UNet2DConditionModel):
    psi = variants(slots=2, make=Half)
    attachment = attach(unet, psi)
    bare = run(unet, inputs(4))
    outs: dict[str, Tensor] = {}
    for manner in ("cut", "bool", "float"):
        for cp in psi.values():
            cast(Half, cp).manner = manner
        with attachment.blend(record=True) as kv:
            outs[manner] = run(unet, inputs(4))
        with attachment.frozen(kv):
            assert torch.equal(run(unet, inputs(4)), outs[manner])
    assert close(outs["bool"], outs["cut"]) and close(outs["float"], outs["cut"])
    assert not close(outs["cut"], bare)


def test_observing_gives_the_sources_own_keys_and_values(unet: UNet2DConditionModel):
    psi = variants()
    attachment = attach(unet, psi)
    with attachment.blend(record=True) as at_identity:
        run(unet, inputs(2))
    shaken(psi)
    with attachment.observing() as own:
        run(unet, inputs(2))
    for path, (k, v) in own.items():
        assert torch.equal(k, at_identity[path][0]) and torch.equal(v, at_identity[path][1])


def lone(**options: Any) -> tuple[Attention, Any]:
    """One attention layer by itself, where a U-Net would be."""
    torch.manual_seed(0)
    layer = Attention(query_dim=32, heads=2, dim_head=4, **options).eval()
    return layer, nn.ModuleDict({"attn": layer})


@pytest.mark.parametrize(
    "options",
    [
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.5, "bias": True},
        {"spatial_norm_dim": 4, "residual_connection": True},
        {"qk_norm": "rms_norm"},
        {"qk_norm": "layer_norm"},
    ],
)
@pytest.mark.parametrize("four_d", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_everything_else_that_diffusers_processor_does_is_done(
    options: dict[str, Any], four_d: bool, masked: bool
):
    layer, around = lone(**options)
    x = torch.randn(4, 32, 4, 6)
    more: dict[str, Any] = {}
    if "spatial_norm_dim" in options:  # for maps alone
        four_d, more["temb"] = True, torch.randn(4, 4, 2, 3)
    if masked:
        more["attention_mask"] = torch.where(torch.rand(4, 1, 24) < 0.5, -10000.0, 0.0)
    x = x if four_d else x.flatten(2).transpose(1, 2)
    bare = layer(x, **more)
    attachment = attach(around, {"attn": FullKV(Site("attn", 2, (4, 6), 8, 2))})
    assert torch.equal(layer(x, **more), bare)
    with attachment.blend():
        assert torch.equal(layer(x, **more), bare)


def test_attention_without_scaling_stays_without(unet: UNet2DConditionModel):
    layer, around = lone(scale_qk=False)
    x = torch.randn(2, 24, 32)
    bare = layer(x)
    with attach(around, {"attn": FullKV(Site("attn", 1, (4, 6), 8, 2))}).blend():
        assert close(layer(x), bare)


def test_a_variants_mask_and_the_networks_mask_both_hold():
    layer, around = lone()
    x, theirs = torch.randn(2, 24, 32), torch.arange(24) >= 6
    cp = Half(Site("attn", 2, (4, 6), 8, 2))  # keys before 12
    bias = torch.where(theirs, 0.0, -10000.0).expand(2, 1, -1)
    outs: list[Tensor] = []
    for manner in ("bool", "float"):
        cp.manner = manner
        attachment = attach(around, {"attn": cp})
        with attachment.blend():
            outs.append(layer(x, attention_mask=bias))
        attachment.detach()
    both = torch.where(theirs & (torch.arange(24) < 12), 0.0, -10000.0).expand(2, 1, -1)
    assert all(close(out, layer(x, attention_mask=both)) for out in outs)


def test_cross_attention_is_no_place_for_cp_attn():
    layer, around = lone()
    with (
        attach(around, {"attn": FullKV(Site("attn", 1, (4, 6), 8, 2))}).blend(),
        pytest.raises(UserError, match="attn is not a self-attention"),
    ):
        layer(torch.randn(1, 24, 32), encoder_hidden_states=torch.randn(1, 3, 8))
