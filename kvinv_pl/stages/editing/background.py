"""A background that stays: the source's latents wherever neither the source nor the edit has the subject."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.models.prompts import attention_to_word
from kvinv_pl.stages.invert import mask_of

MARGIN = 1  # tokens around a subject that are the edit's as well: maps are no sharper


def source_subject(denoiser: Denoiser, store: RunStore, source: str, word: str) -> Bool[Tensor, "1 1 h w"]:
    """Where the source has the subject, on the latents' grid: by its mask, or by attention to its word."""
    z_0 = store.trajectory()[:1].to(denoiser.device)
    grid = (z_0.shape[-2], z_0.shape[-1])
    mask = mask_of(store)
    if mask is not None:
        share = F.interpolate(mask[None, None].to(z_0), grid, mode="area")
        return (share > 0.1) | (share == share.amax())  # the smallest subject has a token, too
    seen = attention_to_word(denoiser.backbone, z_0, source, word, grid)
    return (seen > (seen.min() + seen.max()) / 2)[None, None]


def blend_background(
    z: Float[Tensor, "edits c h w"],
    source: Float[Tensor, "1 c h w"],
    in_source: Bool[Tensor, "1 1 h w"],
    in_edit: Float[Tensor, "edits 1 h w"],
) -> Float[Tensor, "edits c h w"]:
    """The latents of edits, with the source's put back away from both subjects.

    As in blended diffusion (Avrahami et al., 2022) and the local blend of prompt-to-prompt. The subject of an
    edit is where its attention map is largest, on as many tokens as the source's: it moves, and keeps its
    size.
    """
    count = int(in_source.sum())
    least = in_edit.flatten(1).topk(count).values[:, -1].view(-1, 1, 1, 1)
    subject = ((in_edit >= least) | in_source).to(z)
    around = F.max_pool2d(subject, 2 * MARGIN + 1, stride=1, padding=MARGIN)
    return torch.lerp(source, z, around)
