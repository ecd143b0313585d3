"""Outputs of chosen convolutions taken over, while an editing method controls a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from kvinv_pl.errors import UserError


@contextmanager
def convolving(
    unet: nn.Module, paths: Sequence[str], change: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Have `change` see, and replace, what these convolutions give; afterwards they are as they were.

    Args:
        unet: The U-Net.
        paths: Module paths of convolutions.
        change: From a path and its output to another one, (branches, 2, c, h, w) both.
    """

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def changed(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            return change(path, out.unflatten(0, (-1, 2))).to(out.dtype).flatten(0, 1)

        return changed

    layers = dict(unet.named_modules())
    if wrong := [path for path in paths if not isinstance(layers.get(path), nn.Conv2d)]:
        raise UserError(f"{wrong[0]!r} is no convolution of this U-Net: take the paths from its decoder")
    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(layers[path].register_forward_hook(hook(path)))
        yield
