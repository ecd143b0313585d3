"""A change in memory is noticed whatever it is, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fits
import pytest
import torch
from peft import LoraConfig

from kvinv_pl.models.fingerprint import ChangeTracker, fingerprint
from kvinv_pl.models.stable_diffusion import Backbone


def lora(unet: Any) -> None:
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


def bare(unet: Any) -> None:
    """An adapter, gone again."""
    lora(unet)
    unet.unload_lora()


@pytest.fixture
def backbone() -> Backbone:
    return Backbone.load(str(fits.checkpoint()))


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        (lora, True),
        (lambda unet: unet.conv_out.weight.data.mul_(-1), True),
        (lambda unet: unet.conv_in.bias.data.add_(1e-4), True),
        (bare, False),
        (lambda unet: unet.to(memory_format=torch.channels_last), False),
        (lambda unet: unet.train().requires_grad_(True), False),
        (lambda unet: unet.set_attention_slice("max"), False),
    ],
)
def test_what_changes_what_a_model_gives_is_noticed_once_and_nothing_else(
    change: Callable[[Any], Any], noticed: bool, backbone: Backbone
) -> None:
    changes, identity = ChangeTracker(backbone), dict(backbone.identity)
    assert not changes.update_identity() and backbone.identity == identity
    change(backbone.unet)
    assert changes.update_identity() is noticed and not changes.update_identity()
    assert backbone.identity.get("changed_in_memory") == (["unet"] if noticed else None)
    assert (backbone.identity["sha256"] != identity["sha256"]) is noticed
    if noticed:
        assert not any(weight.requires_grad for weight in backbone.parameters())


def test_the_state_of_an_adapter_is_part_of_the_fingerprint(backbone: Backbone) -> None:
    unet: Any = backbone.unet
    lora(unet)
    found = {fingerprint(unet)}
    for layer in unet.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.5)
    found.add(fingerprint(unet))
    unet.disable_lora()
    assert len({*found, fingerprint(unet)}) == 3


def test_a_change_that_is_the_same_gives_the_same_identity_and_one_undone_the_first(
    backbone: Backbone,
) -> None:
    other, shas = Backbone.load(str(fits.checkpoint())), list[str]()
    first = dict(backbone.identity)
    before = backbone.text_encoder.get_parameter("final_layer_norm.bias").detach().clone()
    changes = ChangeTracker(backbone)
    for each, seen in ((backbone, changes), (other, ChangeTracker(other))):
        each.text_encoder.get_parameter("final_layer_norm.bias").data.add_(1)
        assert seen.update_identity()
        shas.append(each.identity["sha256"])
    assert shas[0] == shas[1] != first["sha256"]
    backbone.text_encoder.get_parameter("final_layer_norm.bias").data.copy_(before)
    assert changes.update_identity() and backbone.identity == first and not backbone.notes
