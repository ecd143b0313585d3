"""The frozen front: the same to the last bit, and the modules before psi run once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import checkpoints
import fits
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kvinv_pl.attention import Selection, Site, select, self_attentions
from kvinv_pl.attention.attachment import Attachment, attach
from kvinv_pl.models.feature_cache import FeatureCache
from kvinv_pl.models.stable_diffusion import Backbone
from kvinv_pl.training.datamodule import SourceImages

TINY: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
SD15 = {**TINY, "layers_per_block": 2, "block_out_channels": (8, 8, 8, 8)}
SD15 |= {"down_block_types": checkpoints.FOUR_DOWN, "up_block_types": checkpoints.FOUR_UP}
REAL = {**SD15, "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "norm_num_groups": 32}
REAL |= {"cross_attention_dim": 768, "attention_head_dim": 8}


def unet_of(config: dict[str, Any]) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**config).requires_grad_(False).eval()


def equip(unet: UNet2DConditionModel, where: str, slots: int = 1) -> tuple[Attachment, FeatureCache]:
    """CP-attn with a psi that has learned something, and the front before it."""
    size = unet.config["sample_size"]
    sites = select(self_attentions(unet, (size, size)), Selection(where))
    psi = {s.path: FullKV(Site(s.path, slots, s.grid, s.dim, s.heads), start="noise") for s in sites}
    for n, cp in enumerate(psi.values()):
        cp.reset(torch.Generator().manual_seed(n))
        for gamma in (cp.gamma_k, cp.gamma_v):
            nn.init.constant_(gamma, 0.3)
    return attach(unet, psi), FeatureCache(unet, psi.values())


def given(unet: UNet2DConditionModel, rows: int = 1, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, times and prompts for so many rows."""
    g, config = torch.Generator().manual_seed(seed), unet.config
    z = torch.randn(rows, config["in_channels"], config["sample_size"], config["sample_size"], generator=g)
    return z, torch.full((rows,), 500), torch.randn(rows, 5, config["cross_attention_dim"], generator=g)


def step(unet: UNet2DConditionModel, psi: Any, z: Tensor, t: Tensor, prompt: Tensor) -> list[Tensor]:
    """One forward and backward: the output and every gradient of psi."""
    for cp in psi.values():
        cp.zero_grad()
    out = unet(z, t, encoder_hidden_states=prompt, return_dict=False)[0]
    out.float().square().sum().backward()
    return [out.detach(), *[p.grad.clone() for cp in psi.values() for p in cp.parameters()]]


def equal(before: list[Tensor], now: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def names(unet: nn.Module, front: FeatureCache) -> list[str]:
    known = {module: name for name, module in unet.named_modules()}
    return [known[module] for module in front.modules]


@pytest.mark.parametrize(
    ("config", "where", "branches", "slots", "autocast", "lora"),
    [
        (TINY, "decoder", 1, 1, False, False),
        (TINY, "decoder", 2, 1, False, True),
        (TINY, "decoder", 2, 2, True, True),
        (TINY, "encoder", 2, 1, False, False),
        (TINY, "encoder", 2, 2, True, False),
        (TINY, "middle", 1, 2, False, False),
        (TINY, "all", 1, 2, False, True),
        (TINY, "all", 2, 1, True, False),
        (SD15, "decoder", 2, 1, True, False),
        (SD15, "all", 1, 2, False, False),
    ],
)
def test_outputs_and_gradients_are_the_same_to_the_last_bit(
    config: dict[str, Any], where: str, branches: int, slots: int, autocast: bool, lora: bool
):
    unet = unet_of(config)
    if lora:
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "conv1"], init_lora_weights=False))
        unet.eval()
    attachment, front = equip(unet, where, slots)
    inputs = given(unet, branches * slots)
    with attachment.blend(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        plain = step(unet, attachment.psi, *inputs)
        for _ in range(2):
            with front.reuse():
                assert equal(plain, step(unet, attachment.psi, *inputs))
    assert front.modules


def test_psi_may_change_while_the_front_stays():
    unet = unet_of(SD15)
    attachment, front = equip(unet, "decoder")
    inputs = given(unet)
    with attachment.blend(), front.reuse():
        first = step(unet, attachment.psi, *inputs)
        with torch.no_grad():
            for cp in attachment.psi.values():
                cp.get_parameter("v_hat").add_(0.5)
        second = step(unet, attachment.psi, *inputs)
    with attachment.blend():
        assert equal(second, step(unet, attachment.psi, *inputs))
    assert not equal(first, second)


def test_the_front_of_the_decoder_is_all_that_comes_before_its_first_self_attention():
    unet = unet_of(SD15)
    attachment, front = equip(unet, "decoder")
    with attachment.blend(), front.reuse():
        step(unet, attachment.psi, *given(unet))
        block, attention = "up_blocks.1.attentions.0", "transformer_blocks.0"
        assert names(unet, front) == [
            *("time_proj", "time_embedding", "conv_in"),
            *(f"down_blocks.{n}" for n in range(4)),
            *("mid_block", "up_blocks.0", "up_blocks.1.resnets.0", f"{block}.norm", f"{block}.proj_in"),
            *(f"{block}.{attention}.{name}" for name in ("norm1", "attn1.to_q", "attn1.to_k", "attn1.to_v")),
        ]
        inside = {inner for module in front.modules for inner in module.modules()} - set(front.modules)
        ran: set[nn.Module] = set()
        for module in unet.modules():
            module.register_forward_hook(lambda module, *_: ran.add(module))
        step(unet, attachment.psi, *given(unet))
    assert unet.conv_out in ran and not ran & inside


def test_the_front_of_every_layer_is_what_comes_before_the_very_first():
    unet = unet_of(TINY)
    attachment, front = equip(unet, "all")
    with attachment.blend(), front.reuse():
        step(unet, attachment.psi, *given(unet))
    assert names(unet, front)[:4] == ["time_proj", "time_embedding", "conv_in", "down_blocks.0.resnets.0"]
    assert not any(
        name.startswith(("down_blocks.1", "mid_block", "up_blocks")) for name in names(unet, front)
    )


def test_other_inputs_get_a_front_of_their_own():
    unet = unet_of(TINY)
    attachment, front = equip(unet, "decoder")
    with attachment.blend(), front.reuse():
        step(unet, attachment.psi, *given(unet))
        for n in range(3):
            inputs = list(given(unet))
            inputs[n] = inputs[n] + 1
            new = step(unet, attachment.psi, *inputs)
            with front_off(front):
                assert equal(new, step(unet, attachment.psi, *inputs))


@contextmanager
def front_off(front: FeatureCache) -> Iterator[None]:
    """The network as it is outside, for a while."""
    network = front._network
    mine = vars(network).pop("forward")
    yield
    network.forward = mine


def test_what_is_forgotten_is_computed_anew():
    unet = unet_of(TINY)
    attachment, front = equip(unet, "decoder")
    with attachment.blend(), front.reuse():
        before = step(unet, attachment.psi, *given(unet))
        with torch.no_grad():
            unet.conv_in.weight.mul_(2)
        assert equal(before, step(unet, attachment.psi, *given(unet)))
        front.clear()
        assert not front.modules
        after = step(unet, attachment.psi, *given(unet))
    assert not equal(before, after)


def test_outside_the_network_is_as_it_was_and_after_an_error_too():
    unet = unet_of(TINY)
    own: Any = unet.conv_in.forward
    unet.conv_in.forward = own  # as accelerate leaves it
    attachment, front = equip(unet, "decoder")
    before = {module: dict(vars(module)) for module in unet.modules()}
    z, t, prompt = given(unet)
    with attachment.blend(), front.reuse():
        step(unet, attachment.psi, z, t, prompt)
        step(unet, attachment.psi, z, t, prompt)
    assert before == {module: dict(vars(module)) for module in unet.modules()}
    with attachment.blend(), front.reuse(), pytest.raises(RuntimeError):
        step(unet, attachment.psi, z, t, prompt[..., :3])
    assert before == {module: dict(vars(module)) for module in unet.modules()}
    assert unet.conv_in.forward is own and not front.modules


def test_gradient_checkpointing_computes_the_same():
    unet = unet_of(SD15)
    attachment, front = equip(unet, "decoder")
    inputs = given(unet)
    with attachment.blend():
        plain = step(unet, attachment.psi, *inputs)
    unet.enable_gradient_checkpointing()
    unet.train()
    with attachment.blend(), front.reuse():
        for _ in range(2):
            again = step(unet, attachment.psi, *inputs)
            assert equal(plain, again)


class Odd(nn.Module):
    """A network with everything that is awkward: modules called twice, changes in place, odd results."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.pair, self.spoilt = nn.Linear(4, 4), Pair(), nn.Linear(4, 4)
        self.late, self.strange = nn.Linear(4, 4), Strange()

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(x) + 1
        x = self.twice(x)
        listed = self.pair(x)
        listed[0], listed[1] = listed[1], listed[0]
        y = self.spoilt(x)
        y[0] += 1  # through a view
        z = self.strange(y).tensor
        return self.twice(self.late(listed[0] + 2 * listed[1] + y + z))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x + 1, x * 2]


class Strange(nn.Module):
    def forward(self, x: Tensor) -> Any:
        class Box:
            tensor = x * 3

        return Box()


def test_modules_called_twice_changes_in_place_and_odd_results_are_no_matter():
    torch.manual_seed(0)
    network = Odd()
    front, x = FeatureCache(network, [network.late]), torch.randn(2, 4)
    for _ in range(3):
        with front.reuse():
            one = network(x)
        assert torch.equal(one, network(x))
    assert front.modules == [network.twice, network.pair]  # neither what was spoilt nor what cannot be kept


def test_a_network_that_meets_nothing_late_runs_in_full():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    front, x = FeatureCache(network, [nn.Linear(4, 4)]), torch.randn(2, 4)
    with front.reuse():
        before = network(x)
        nn.init.zeros_(network.get_parameter("0.weight"))
        assert not torch.equal(before, network(x))
    assert not front.modules


def test_at_real_size_an_inner_step_saves_all_that_comes_before_the_decoders_self_attention():
    with torch.device("meta"):
        unet = unet_of(REAL)
        attachment, front = equip_on_meta(unet)
        inputs = (torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768))

        def forward(grad: bool) -> float:
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
                out = unet(*inputs, return_dict=False)[0]
                if grad:
                    out.sum().backward()
            return counter.get_total_flops() / 1e9

        with attachment.blend():
            plain, whole = forward(False), forward(True)
            with front.reuse():
                forward(False)
                assert plain - forward(False) > 287
                rest = forward(True)
                assert whole - rest > 287 and rest < 0.78 * whole


def equip_on_meta(unet: UNet2DConditionModel) -> tuple[Attachment, FeatureCache]:
    psi = {site.path: FullKV(site) for site in select(self_attentions(unet, (64, 64)), Selection("decoder"))}
    return attach(unet, psi), FeatureCache(unet, psi.values())


# -------------------------------------------------------------------------------------- in a fit


@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("32-true", {"slots": 2}),
        ("bf16-mixed", {"guidance": 1.0}),
        ("bf16-mixed", {"target_modules": "all", "carry": False, "steps": 2}),
    ],
    ids=["two slots", "one branch in bf16", "all layers in bf16"],
)
def test_a_fit_leaves_the_same_files_as_one_without_a_front(
    precision: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    image = fits.picture(tmp_path / "cat.png")

    def files(name: str) -> dict[str, str]:
        module, out = fits.model(**settings), tmp_path / name
        data = SourceImages(str(image), fits.SOURCE, out=str(out))
        fits.trainer(precision=precision).fit(module, datamodule=data)
        assert not module.denoiser.cache.modules
        return fits.tensors(fits.RunStore(out))

    with_front = files("with")
    monkeypatch.setattr(FeatureCache, "reuse", lambda self, *made_of: nullcontext())
    assert files("without") == with_front


def test_a_phase_runs_its_front_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[nn.Module] = []
    own = Backbone.load

    def load(*args: Any) -> Backbone:
        backbone = own(*args)
        backbone.unet.get_submodule("down_blocks.0.resnets.0.conv1").register_forward_hook(
            lambda module, *_: ran.append(module)
        )
        return backbone

    monkeypatch.setattr(Backbone, "load", load)
    store = fits.fit(fits.picture(tmp_path / "cat.png"), tmp_path / "run", inner_steps=4)
    assert store.read_run()["reconstruction"]["inner_steps"] == 3 * 4
    assert len(ran) == 3 + 3  # the steps of the inversion, and the phases
