"""Beginning with an earlier checkpoint: the weights that two nets have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from kvinv_pl.errors import UserError


def part(checkpoint: Path, name: str) -> Path:
    """The folder of one part of a checkpoint; without it, one line."""
    if not (checkpoint / name).is_dir():
        raise UserError(
            f"--begin {checkpoint} has no folder {name}: expected an earlier export, give its folder"
        )
    return checkpoint / name


@torch.no_grad()
def take_over(net: nn.Module, weights: Mapping[str, Tensor], new_inputs: bool = True) -> int:
    """Copy what overlaps of the weights of the same names; returns how many tensors were copied.

    Where a tensor of the net is larger, its first rows and columns are copied; what is beyond is zero unless
    `new_inputs` leaves it as it is.
    """
    copied = 0
    for name, mine in net.state_dict().items():
        theirs = weights.get(name)
        if theirs is None or theirs.dim() != mine.dim():
            continue
        if mine.shape != theirs.shape and not new_inputs:
            mine.zero_()
        common = tuple(slice(min(a, b)) for a, b in zip(mine.shape, theirs.shape, strict=True))
        mine[common] = theirs[common].to(mine)
        copied += 1
    return copied


def one_level_deeper(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The weights of an autoencoder, named as in one that has one more level on the outside.

    What is at the picture's own resolution, conv_in and conv_out and the last norm, is left out.
    """
    outer = ("encoder.conv_in.", "decoder.conv_out.", "decoder.conv_norm_out.")
    renamed = {}
    for name, weight in weights.items():
        if not name.startswith(outer):
            for level in reversed(range(levels)):
                name = name.replace(f"encoder.down_blocks.{level}.", f"encoder.down_blocks.{level + 1}.")
            renamed[name] = weight
    return renamed


def with_more_channels(weights: Mapping[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The same weights of an autoencoder whose posterior has more channels."""
    wider = dict(weights)  # rows of each: means first, then log-variances
    for name in ("encoder.conv_out.weight", "encoder.conv_out.bias", "quant_conv.weight", "quant_conv.bias"):
        halves = weights[name].chunk(2)
        more = channels - len(halves[0])
        halves = [torch.cat([half, 0.01 * torch.randn(more, *half.shape[1:])]) for half in halves]
        if name == "quant_conv.weight":  # its inputs are those two halves, too
            halves = [_spread(half, more) for half in halves]
            for at in range(more):
                halves[0][channels - more + at, channels - more + at] = 1.0
        if name == "quant_conv.bias":  # a deviation of 0.05: more would be learned to be ignored
            halves[1][channels - more :] = -6.0
        wider[name] = torch.cat(halves)
    return wider


def _spread(weight: Tensor, more: int) -> Tensor:
    means, variances = weight.chunk(2, 1)
    nothing = weight.new_zeros(len(weight), more, *weight.shape[2:])
    return torch.cat([means, nothing, variances, nothing], 1)


@torch.no_grad()
def take_over_words(
    text: CLIPTextModel, tokenizer: CLIPTokenizer, known: CLIPTextModel, words: CLIPTokenizer
) -> int:
    """Begin with another text encoder, token by token of the same spelling; returns how many are the same."""
    weights = known.state_dict()
    name = next(name for name in weights if name.endswith("token_embedding.weight"))
    table, old = text.state_dict()[name], words.get_vocab()
    same = {number: old[token] for token, number in tokenizer.get_vocab().items() if token in old}
    for number, before in same.items():
        table[number] = weights[name][before]
    take_over(text, {key: value for key, value in weights.items() if key != name})
    return len(same)
