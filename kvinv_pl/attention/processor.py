"""diffusers' attention processor with a seam between the projections and the attention."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor, nn

from kvinv_pl.attention.sites import Site
from kvinv_pl.errors import UserError

KV = tuple[Tensor, Tensor]
Sdpa = Callable[..., Tensor]  # sdpa(q, k, v, mask=None) -> out, all (branches, slots, tokens, dim)
Project = Callable[..., KV]  # project(branches=None) -> k and v of the first so many branches; None: of all
Mode = Callable[[Site, Tensor, Project, Sdpa], Tensor]  # (site, q, project, sdpa) -> out
# Processors of plain attention without weights of their own, and the calls that set them.
PLAIN: dict[type, str] = {
    AttnProcessor: "set_attn_processor or set_default_attn_processor",
    AttnProcessor2_0: "set_attn_processor, load_ip_adapter, or switching slicing or xformers off",
    SlicedAttnProcessor: "set_attention_slice or enable_attention_slicing",
    FusedAttnProcessor2_0: "fuse_qkv_projections",
    XFormersAttnProcessor: "enable_xformers_memory_efficient_attention",
}


class CPProcessor:
    """Self-attention whose middle part is `mode`; without a mode, the original processor.

    A plain object and never an nn.Module: what sits in the U-Net as a module is frozen by the next LoRA.
    """

    def __init__(self, site: Site, original: Any):
        self.site = site
        self.original = original
        self.mode: Mode | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As diffusers' own processor, with `mode` as its middle; the argument names are diffusers'."""
        if (mode := self.mode) is None:
            more = {} if temb is None else {"temb": temb}
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, **more)
        if encoder_hidden_states is not None:
            raise UserError(f"{self.site.path} is not a self-attention: leave it out of the selection")

        def middle(x: Tensor) -> Tensor:
            rows, tokens, _ = x.shape
            self._check(rows, tokens)

            def project(x: Tensor, layer: nn.Module | None, norm: nn.Module | None = None) -> Tensor:
                if layer is None:
                    raise UserError(
                        f"{self.site.path} does not compute its own K and V: leave it out of the selection"
                    )
                return project_tokens(attn, x, layer, norm).unflatten(0, (-1, self.site.slots))

            def keys_values(branches: int | None = None) -> KV:
                part = x if branches is None else x[: branches * self.site.slots]
                return project(part, attn.to_k, attn.norm_k), project(part, attn.to_v)

            q = project(x, attn.to_q, attn.norm_q)
            bias = attention_mask
            if bias is not None:
                bias = attn.prepare_attention_mask(bias, tokens, rows)
            return mode(self.site, q, keys_values, make_sdpa(attn, q, bias)).flatten(0, 1)

        return apply_attention(attn, hidden_states, temb, middle)

    def _check(self, rows: int, tokens: int) -> None:
        site = self.site
        if tokens != site.tokens:
            raise UserError(
                f"{site.path}: expected {site.tokens} tokens (a grid of {site.grid}), got {tokens}: "
                "psi belongs to latents of another size; use that size, or find the sites again"
            )
        if rows % site.slots:
            raise UserError(
                f"{site.path}: expected a multiple of the {site.slots} slots, got {rows} rows: "
                "order the rows by edit, then uncond/cond, then slot"
            )


def apply_attention(
    attn: Attention, hidden_states: Tensor, temb: Tensor | None, middle: Callable[[Tensor], Tensor]
) -> Tensor:
    """The attention of diffusers around its middle: (rows, tokens, channels) to (rows, tokens, dim)."""
    x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
    shape = x.shape
    if x.ndim == 4:
        x = x.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    y = middle(x)
    for layer in attn.to_out or ():  # the projection, then dropout
        y = layer(y)
    if len(shape) == 4:
        y = y.transpose(1, 2).reshape(shape)
    if attn.residual_connection:
        y = y + hidden_states
    return y / attn.rescale_output_factor


def project_tokens(attn: Attention, x: Tensor, layer: nn.Module, norm: nn.Module | None) -> Tensor:
    """Q, K or V of a sequence, normalised one head at a time where the layer does that."""
    y = layer(x)
    if norm is not None:
        y = norm(y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
    return y


def make_sdpa(attn: Attention, q: Tensor, bias: Tensor | None) -> Sdpa:
    """Eq. 2 for one layer: split the heads, softmax(Q K^T / sqrt(d)) V, merge the heads."""
    every, slots, dtype = q.shape[0], q.shape[1], q.dtype

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sharpness: float = 1.0) -> Tensor:
        branches = q.shape[0]  # all, or the source's or the edits' own

        def heads(x: Tensor) -> Tensor:
            x = x.to(dtype).expand(branches, slots, -1, -1).flatten(0, 1)
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        if bias is not None and branches != every:
            raise UserError(
                "a U-Net that masks its own self-attention cannot run the source along with its edits: "
                "use kv stored in place of replayed"
            )
        scores = None if bias is None else bias.view(every * slots, attn.heads, -1, bias.shape[-1])
        if mask is not None:
            if mask.dtype != torch.bool:
                mask = mask.to(dtype)
            elif scores is not None:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))
            mask = mask.expand(branches, slots, q.shape[2], k.shape[2]).flatten(0, 1).unsqueeze(1)
            scores = mask if scores is None else scores + mask
        scale = None if attn.scale_qk else 1.0
        if sharpness != 1:
            scale = sharpness * (attn.scale if attn.scale_qk else 1.0)
        out = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=scores, scale=scale)
        return out.transpose(1, 2).flatten(2).unflatten(0, (branches, slots))

    return sdpa


def attention_layer(unet: nn.Module, path: str, who: str) -> Attention:
    """The attention layer at `path`, if its processor may be stood in for; `who` would, for the error."""
    try:
        layer = unet.get_submodule(path)
    except AttributeError:
        layer = None
    if not isinstance(layer, Attention):
        raise UserError(f"{path!r} is not an attention layer of this U-Net; `kvinv sites` lists them")
    found = layer.processor
    if isinstance(found, CPProcessor):
        raise UserError(f"CP-attn is attached to {path} already: detach it first")
    if type(found) not in PLAIN:
        raise UserError(
            f"{path} has a {type(found).__name__}, whose effect {who} would silently drop: expected one of "
            f"{', '.join(kind.__name__ for kind in PLAIN)}; undo what put it there"
        )
    return layer


def expand_to_edits(site: Site, q: Tensor, stored: Tensor) -> Tensor:
    """A stored K-bar or V-bar for all rows of q: edit after edit, each with all stored branches."""
    if stored.ndim != 4 or stored.shape[1:] != q.shape[1:] or q.shape[0] % stored.shape[0]:
        raise UserError(
            f"{site.path}: K-bar and V-bar of the shape {tuple(stored.shape)} cannot serve a forward of "
            f"{tuple(q.shape)} (branches, slots, tokens, dim): use the picture size, slots and guidance "
            "branches of the tuning"
        )
    edits = q.shape[0] // stored.shape[0]
    return stored.to(q.device, q.dtype).expand(edits, *stored.shape).flatten(0, 1)
