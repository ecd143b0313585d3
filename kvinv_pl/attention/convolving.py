"""Outputs of chosen convolutions taken over, while an editing method controls a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from kvinv_pl.errors import UserError


@contextmanager
def convolving(
    unet: nn.Module, paths: Sequence[str], change: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Have `change` see, and replace, what these convolutions give, (branches, 2, c, h, w); then undo it."""

    def changed(path: str, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return change(path, out.unflatten(0, (-1, 2))).to(out.dtype).flatten(0, 1)

    layers = dict(unet.named_modules())
    if wrong := [path for path in paths if not isinstance(layers.get(path), nn.Conv2d)]:
        raise UserError(f"{wrong[0]!r} is no convolution of this U-Net: take the paths from its decoder")
    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(layers[path].register_forward_hook(partial(changed, path)))
        yield
