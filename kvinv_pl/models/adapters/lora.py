"""LoRA files, merged into the weights of the U-Net and the text model: every tensor of a file, or none.

diffusers' own loader leaves out what it does not know, such as the magnitudes of a DoRA; here, a tensor whose
name is not exactly that of a layer is refused.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from kvinv_pl.errors import UserError
from kvinv_pl.models.adapters.lora_names import UNSUPPORTED, LoraTarget, NamedLayers, layers_by_name, role_of
from kvinv_pl.models.adapters.lora_scale import Scales, read_scales
from kvinv_pl.models.checkpoints.hub import resolve_file
from kvinv_pl.models.checkpoints.loading import REDOWNLOAD, digest
from kvinv_pl.models.checkpoints.single_file import read_contents, read_tensors


def merge_loras(
    given: Sequence[str], unet: nn.Module, text_encoder: CLIPTextModel, allow_pickle: bool
) -> tuple[dict[str, str], list[str]]:
    """Merge LoRAs, each FILE or FILE:WEIGHT, into models in fp32; their digests, and a line about them."""
    digests, merged = dict[str, str](), list[str]()
    for n, text in enumerate(given, 1):
        name, weight = name_and_weight(text)
        path = resolve_file(name, "a LoRA")
        counts = _merge(path, weight, unet, text_encoder, allow_pickle)
        digests[f"lora {n}"] = f"{digest(path)} {weight!r}"
        merged.append(f"{name} at {weight:g} ({counts})")
    return digests, [f"merged into the weights: {'; '.join(merged)}"] if merged else []


def name_and_weight(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT; the weight is 1 where none is given."""
    name, _, after = text.rpartition(":")
    try:
        weight = float(after)
    except ValueError:  # no weight: a path may have a colon
        return text, 1.0
    if not name or not math.isfinite(weight):
        raise UserError(f"--model.loras: expected FILE or FILE:WEIGHT with a finite weight, got {text!r}")
    return name, weight


def _merge(
    path: Path, weight: float, unet: nn.Module, text_encoder: CLIPTextModel, allow_pickle: bool
) -> str:
    metadata = read_contents(path, allow_pickle).metadata
    tensors = read_tensors(path)
    scales = read_scales(path, metadata, tensors)
    counts = {"unet": 0, "text_encoder": 0}
    for name, layer, change in _changes(path, tensors, layers_by_name(unet, text_encoder), scales):
        layer.weight.data = layer.weight.data + weight * change  # not in place: it may be mapped from a file
        counts[name.partition(".")[0]] += 1
    return f"{counts['unet']} layers of the U-Net, {counts['text_encoder']} of the text model"


def _changes(
    path: Path, tensors: Mapping[str, Tensor], layers: NamedLayers, scales: Scales
) -> Iterator[tuple[str, LoraTarget, Tensor]]:
    """Every layer that a file changes, and by how much at weight 1: alpha / rank * up [mid] down."""
    found, unknown = dict[str, dict[str, Tensor]](), list[str]()
    for name, tensor in tensors.items():
        key, role = role_of(name)
        if role and key in layers:
            found.setdefault(key, {})[role] = tensor
        else:
            unknown.append(name)
    if unknown or not found:
        raise UserError(_unknown_tensors(path, unknown))
    keys = dict[str, str]()
    for key, parts in found.items():
        name, layer = layers[key]
        if (other := keys.setdefault(name, key)) != key:
            raise UserError(f"{path} changes {name} twice, as {other} and as {key}: leave one of them out")
        try:
            product = _product(parts)
        except (KeyError, RuntimeError, IndexError) as error:
            has = ", ".join(f"{role} {_shape_text(part.shape)}" for role, part in parts.items())
            raise UserError(
                f"{path} is incomplete or damaged: of {key} it has {has}; {REDOWNLOAD}"
            ) from error
        if _matrix(product.shape) != _matrix(layer.weight.shape):
            raise UserError(
                f"{path} is for another model: {key} is {_shape_text(_matrix(product.shape))} there, and "
                f"{_shape_text(_matrix(layer.weight.shape))} in this checkpoint"
            )
        change = product * scales.of(name, len(parts["down"]), parts.get("alpha"))
        if not change.isfinite().all():
            raise UserError(f"{path} is damaged: what it has of {key} is not finite; {REDOWNLOAD}")
        yield name, layer, change.reshape(layer.weight.shape)


def _product(parts: Mapping[str, Tensor]) -> Tensor:
    """Up [mid] down in fp32, (out, in, ...)."""
    down, up = parts["down"].float(), parts["up"].float()
    if up[0, 0].numel() != 1:
        raise RuntimeError("the upper matrix is not a matrix")
    if (mid := parts.get("mid")) is not None:  # a convolution, decomposed
        return torch.einsum("oa,abhw,bi->oihw", up.flatten(1), mid.float(), down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])


def _matrix(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without a kernel of 1 x 1: such a convolution is a linear layer."""
    return tuple(shape[:2]) if math.prod(shape[2:]) == 1 else tuple(shape)


def _shape_text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _unknown_tensors(path: Path, unknown: Sequence[str]) -> str:
    what = next((what for sign, what in UNSUPPORTED.items() if any(sign in name for name in unknown)), None)
    if what is not None:
        return f"{path} contains {what}; expected a LoRA for Stable Diffusion 1 or 2"
    some = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
    return (
        f"{path} contains what is not a LoRA of a layer of this checkpoint: {some or 'no tensors'}; "
        "expected one in the layout of kohya, diffusers or peft"
    )
