"""What tests do not do anew is what it would have been."""

from __future__ import annotations

import inspect
from io import BytesIO
from pathlib import Path

import checkpoints
import numpy as np
import savings
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from PIL import Image, ImageDraw, ImageFont
from torch import nn


def torchs_walk(net: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """What torch documents: each module before those in it, by the path where it is met."""
    met = [(path, net)]
    for name, child in net._modules.items():
        if child is not None:
            met += torchs_walk(child, f"{path}.{name}" if path else name)
    return met


def test_modules_are_walked_in_their_order_and_once() -> None:
    shared = nn.Linear(1, 1)
    net = nn.Sequential(checkpoints.tiny_unet(), shared, nn.Sequential(nn.ReLU(), shared))
    net.register_module("none", None)
    every = torchs_walk(net)
    assert len(every) > 100 and [path for path, module in every if module is shared] == ["1", "2.1"]
    assert [*net.named_modules(remove_duplicate=False)] == every
    once = [(path, module) for path, module in every if path != "2.1"]
    assert [*net.named_modules()] == once == [*savings.named_modules(net)]
    assert [*net.named_modules({shared}, "net")] == [
        (f"net.{path}" if path else "net", module) for path, module in once if module is not shared
    ]


def test_a_processors_signature_is_that_of_its_call() -> None:
    for kind in (AttnProcessor2_0, FusedAttnProcessor2_0):
        call = kind().__call__
        assert savings.signature_once(call) == inspect.signature(call) == savings.signature_once(call)
    assert savings.signature_once(len) == inspect.signature(len)


def test_a_png_has_the_pixels_that_it_was_given(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    picture.save(buffer := BytesIO(), "PNG", compress_level=9)
    for made in (tmp_path / "a.png", buffer):
        with Image.open(made) as opened:
            assert opened.format == "PNG" and (np.asarray(opened) == np.asarray(picture)).all()


def test_a_line_of_text_is_rendered_in_its_own_font_and_place() -> None:
    def page(text: str, size: int, left: float, fill: str) -> bytes:
        made = Image.new("RGB", (80, 24), "white")
        ImageDraw.Draw(made).text((left, 2), text, fill=fill, font=ImageFont.load_default(size))
        return made.tobytes()

    asked = [
        ("cat", 13, 4, "black"),
        ("dog", 13, 4, "black"),
        ("cat", 9, 4, "black"),
        ("cat", 13, 4.5, "red"),
    ]
    first = [page(*each) for each in asked]
    assert len(set(first)) == len(asked) and [page(*each) for each in asked] == first
