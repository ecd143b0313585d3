"""Attentions and convolutions taken over at chosen layers, while an editing method controls a forward."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from kvinv_pl.algorithm.network import Attending, Control
from kvinv_pl.attention.processor import apply_attention, attention_layer, make_sdpa, project_tokens
from kvinv_pl.errors import UserError


@contextmanager
def controlled(
    unet: nn.Module, grids: Mapping[int, tuple[int, int]], i: int, control: Control
) -> Iterator[None]:
    """Have a control compute its attentions, and change its convolutions, at step i; then all is as it was.

    `grids` are height and width of a map, by the number of its pixels.
    """

    def changed(path: str, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return control.convolve(i, path, out.unflatten(0, (-1, 2))).to(out.dtype).flatten(0, 1)

    attentions = {path: attention_layer(unet, path, "a method") for path in control.attentions}
    processors = {path: layer.processor for path, layer in attentions.items()}
    layers = dict(unet.named_modules())
    if wrong := [path for path in control.convolutions if not isinstance(layers.get(path), nn.Conv2d)]:
        raise UserError(f"{wrong[0]!r} is not a convolution of this U-Net: take the paths from its decoder")
    with ExitStack() as hooks:
        try:
            for path, layer in attentions.items():
                processor: Any = partial(_controlled, path, grids, partial(control.attend, i))
                layer.processor = processor  # set_processor would register a module's hooks, and print
            for path in control.convolutions:
                hooks.enter_context(layers[path].register_forward_hook(partial(changed, path)))
            yield
        finally:
            for path, layer in attentions.items():
                layer.processor = processors[path]


def _controlled(
    path: str,
    grids: Mapping[int, tuple[int, int]],
    middle: Callable[[Attending], Tensor],
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    temb: Tensor | None = None,
) -> Tensor:
    """As diffusers' own processor, with `middle` as its middle; the argument names are diffusers'."""

    def attention(x: Tensor) -> Tensor:
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        layers: Any = attn  # diffusers types to_k and to_v as None, too, which no plain processor has
        q = project_tokens(attn, x, layers.to_q, layers.norm_q).unflatten(0, (-1, 2))
        k = project_tokens(attn, context, layers.to_k, layers.norm_k).unflatten(0, (-1, 2))
        v = project_tokens(attn, context, layers.to_v, None).unflatten(0, (-1, 2))
        bias = attention_mask
        if bias is not None:
            bias = attn.prepare_attention_mask(bias, context.shape[1], len(x))
        at = Attending(
            path, encoder_hidden_states is not None, grids[x.shape[1]], q, k, v, make_sdpa(attn, q, bias),
            attn.heads, attn.scale if attn.scale_qk else 1.0,
        )  # fmt: skip
        with torch.autocast(x.device.type, enabled=False):  # a map in fp32 stays so
            return middle(at).to(q.dtype).flatten(0, 1)

    return apply_attention(attn, hidden_states, temb, attention)
