"""What a test would only do again: each of these gives what it takes the place of gives, and sooner."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers.models import attention_processor
from PIL import Image, ImageFont
from torch import nn


def put_in_place(patch: pytest.MonkeyPatch) -> None:
    """Until `patch` is undone; the processes that tests start do without."""
    patch.setattr(Image.Image, "save", weakly_compressed(Image.Image.save))
    patch.setattr(ImageFont.FreeTypeFont, "getmask2", rendered_once(ImageFont.FreeTypeFont.getmask2))
    patch.setattr(nn.Module, "named_modules", named_modules)
    patch.setattr(attention_processor, "inspect", SimpleNamespace(signature=signature_once))
    if "lightning" in sys.modules:
        registry = importlib.import_module("lightning.fabric.utilities.registry")
        patch.setattr(registry, "entry_points", cache(registry.entry_points))
        strategy = importlib.import_module("lightning.pytorch.strategies").SingleDeviceStrategy
        patch.setattr(strategy, "model_to_device", moved(strategy.model_to_device))


def weakly_compressed(save: Callable[..., None]) -> Callable[..., None]:
    """PNGs of the same pixels: a sheet, at which few tests look, takes as long as a forward to compress."""

    def weakly(picture: Image.Image, file: Any, format: str | None = None, **options: Any) -> None:
        if format == "PNG" or str(file).endswith(".png"):
            options.setdefault("compress_level", 1)
        save(picture, file, format=format, **options)

    return weakly


def rendered_once(render: Callable[..., Any]) -> Callable[..., Any]:
    """A line of text in a font: captions are the same in most tests."""
    kept: dict[Any, Any] = {}

    def once(font: ImageFont.FreeTypeFont, text: str | bytes, *how: Any, **named: Any) -> Any:
        key = (font.getname(), font.size, text, how, *sorted(named.items()))
        if key not in kept:
            kept[key] = render(font, text, *how, **named)
        return kept[key]

    return once


def signature_once(call: Any) -> inspect.Signature:
    """Of an attention's processor, for which diffusers asks in every forward of each."""
    return _signature(call.__func__) if inspect.ismethod(call) else inspect.signature(call)


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Without self."""
    whole = inspect.signature(function)
    return whole.replace(parameters=[*whole.parameters.values()][1:])


def named_modules(
    root: nn.Module, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """As torch's, in its order, without a generator in a generator at each level of the tree."""
    seen = set[nn.Module]() if memo is None else memo
    ahead = [(prefix, root)]
    while ahead:
        path, module = ahead.pop()
        if module in seen:
            continue
        if remove_duplicate:
            seen.add(module)
        yield path, module
        begin = f"{path}." if path else ""
        ahead += [
            (begin + name, child) for name, child in reversed(module._modules.items()) if child is not None
        ]


def moved(move: Callable[[Any], None]) -> Callable[[Any], None]:
    """Lightning's move of the model to its device, before every stage: on the CPU it is there."""

    def elsewhere(strategy: Any) -> None:
        if strategy.root_device.type != "cpu":
            move(strategy)

    return elsewhere
