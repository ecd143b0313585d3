"""Attention maps: a U-Net's cross-attention to chosen tokens, recorded during its forward."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn

from kvinv_pl.attention.sites import grid_of


class AttentionMaps:
    """Attention maps of the watched tokens; rows are those of the U-Net's forward.

    A map is the mean over the heads, in 0..1, fp32 and without gradients.
    """

    def __init__(self) -> None:
        self.layers: dict[str, Float[Tensor, "rows h w"]] = {}
        """One map a layer, by module path: of the forward under way or, between two, of the last one."""
        self.forwards = 0
        """How many have ended, of which `average` is the mean."""
        self.enabled = True
        self._sum: Tensor | None = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing of forwards in here."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def current(self, grid: tuple[int, int]) -> Float[Tensor, "rows h w"] | None:
        """The mean of the layers that this forward has come through, on a grid; None before the first."""
        layers = [resized(layer, grid) for layer in self.layers.values()]
        return torch.stack(layers).mean(0) if layers else None

    def average(self, grid: tuple[int, int]) -> Float[Tensor, "rows h w"] | None:
        """The mean of the forwards that have ended, on a grid; None before the first has."""
        return None if self._sum is None else resized(self._sum / self.forwards, grid)

    def end(self) -> None:
        """Count the layers of a forward into the average, which has the finest of their grids."""
        grids = [(layer.shape[1], layer.shape[2]) for layer in self.layers.values()]
        mean = self.current(max(grids, key=lambda grid: grid[0] * grid[1])) if grids else None
        if mean is not None:
            self._sum = mean if self._sum is None else self._sum + mean
            self.forwards += 1


def resized(maps: Float[Tensor, "rows h w"], grid: tuple[int, int]) -> Float[Tensor, "rows i j"]:
    """Maps on a coarser or finer grid, of the same brightness."""
    if (maps.shape[1], maps.shape[2]) == grid:
        return maps
    return F.interpolate(maps[:, None], grid, mode="bilinear", antialias=True)[:, 0]


def cross_attentions(unet: nn.Module) -> list[str]:
    """The module paths of all cross-attentions."""
    found = ((path, module) for path, module in unet.named_modules() if isinstance(module, Attention))
    return [path for path, module in found if module.is_cross_attention]


@contextmanager
def recording_maps(
    unet: nn.Module,
    positions: Sequence[Sequence[int]],
    against: Sequence[int] = (),
    paths: Sequence[str] | None = None,
) -> Iterator[AttentionMaps]:
    """Record attention maps of some tokens in every forward of the U-Net, without changing its processors.

    The maps may be read during a forward, too: in a decoder's self-attention, `current` is the mean of the
    layers before it, and `average` that of the forwards before.

    Args:
        unet: the U-Net.
        positions: positions of tokens in the prompt, for each row. A row without any has maps of zeros and
            costs nothing. They are repeated over the rows: [[2]] is for all rows, [[], [2]] those of
            guidance.
        against: positions of tokens to compare with. Without any, maps hold the probability p that is given
            to the row's tokens together; with some, whose probability is q, they hold p / (p + q). [0] is the
            start of the prompt, which has no meaning of its own, and takes the attention of heads and pixels
            that attend to nothing in particular.
        paths: module paths of the cross-attentions to watch, all of them by default; others cost nothing.
    """
    chosen = cross_attentions(unet) if paths is None else paths
    maps, inputs = AttentionMaps(), dict[str, tuple[int, int]]()

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        if maps.enabled:
            maps.layers = {}

    def end(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if maps.enabled:
            maps.end()

    def record_grid(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if isinstance(x, Tensor) and x.ndim == 4:
            inputs[path] = (x.shape[2], x.shape[3])

    def record_map(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not maps.enabled:
            return
        names = ("hidden_states", "encoder_hidden_states", "attention_mask")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, context, bias = (given.get(name) for name in names)
        if isinstance(module, Attention) and isinstance(x, Tensor) and isinstance(context, Tensor):
            attention = _attention(module, x, context, bias, positions, against)
            maps.layers[path] = attention.unflatten(1, grid_of(path, x.shape[1], inputs))

    around = {path.rsplit(".", depth)[0] for path in chosen for depth in range(1, path.count(".") + 1)}
    with ExitStack() as hooks:
        hooks.enter_context(unet.register_forward_pre_hook(begin))
        hooks.enter_context(unet.register_forward_hook(end))
        for places, record in ((around, record_grid), (chosen, record_map)):
            for path in places:
                layer = unet.get_submodule(path)
                hooks.enter_context(layer.register_forward_pre_hook(partial(record, path), with_kwargs=True))
        yield maps


@torch.no_grad()
def _attention(
    layer: Attention,
    x: Float[Tensor, "rows tokens dim"],
    context: Float[Tensor, "rows length width"],
    bias: Tensor | None,
    positions: Sequence[Sequence[int]],
    against: Sequence[int],
) -> Float[Tensor, "rows tokens"]:
    """The attention of each pixel to the tokens of its row, mean over the heads; see `recording_maps`."""
    wanted = torch.zeros(len(x), 1, 1, context.shape[1], device=x.device)
    for row in range(len(x)):
        wanted[row, ..., list(positions[row % len(positions)])] = 1
    watched_rows = wanted.flatten(1).any(1)
    maps = torch.zeros(x.shape[:2], device=x.device)
    if not watched_rows.any():
        return maps
    x, context, wanted = x[watched_rows], context[watched_rows], wanted[watched_rows]
    if bias is not None:  # tokens that are not to be read
        bias = layer.prepare_attention_mask(bias[watched_rows], context.shape[1], len(x))
    if layer.norm_cross:
        context = layer.norm_encoder_hidden_states(context)
    project: Any = layer.to_k  # which a cross-attention has
    q, k = layer.head_to_batch_dim(layer.to_q(x)), layer.head_to_batch_dim(project(context))
    q = layer.norm_q(q) if layer.norm_q is not None else q
    k = layer.norm_k(k) if layer.norm_k is not None else k
    # (rows, heads, tokens, length)
    probability = layer.get_attention_scores(q, k, bias).float().unflatten(0, (len(x), layer.heads))
    share = (probability * wanted).sum(3)
    if against:
        share = share / (share + probability[..., list(against)].sum(3)).clamp_min(1e-12)
    maps[watched_rows] = share.mean(1)
    return maps
