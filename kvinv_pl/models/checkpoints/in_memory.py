"""A pipeline of diffusers in memory: a copy of its parts, and a fingerprint of all that they are."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from kvinv_pl.attention.unet import refuse_other_conditions
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.folder import Parts, refuse_other_kinds

IN_MEMORY = "pipeline in memory"
"""The name of the checkpoint in the identity."""


@runtime_checkable
class Pipeline(Protocol):
    """A pipeline of diffusers, by its parts."""

    @property
    def components(self) -> Mapping[str, Any]:
        """Unet, vae, text_encoder, tokenizer, scheduler and others."""
        ...


def refuse_other_pipelines(pipeline: object) -> None:
    """Refuse what is not made of the parts of Stable Diffusion 1 and 2."""
    kind, parts = type(pipeline).__name__, getattr(pipeline, "components", None)
    if not isinstance(parts, Mapping):
        raise UserError(f"checkpoint: expected a path, a hub id or a pipeline of diffusers, got {kind}")
    names = {name: ["", type(_unwrapped(part)).__name__] for name, part in parts.items() if part is not None}
    refuse_other_kinds(IN_MEMORY, {"_class_name": kind, **names})
    refuse_other_conditions(_unwrapped(parts["unet"]).config, "the U-Net of the pipeline")
    if parts.get("scheduler") is None:
        raise UserError(f"the {kind} has no scheduler, which says its noise schedule: give it one")


def copy_parts(pipeline: Pipeline, dtype: torch.dtype, other_vae: AutoencoderKL | None) -> Parts:
    """A copy of the parts, with the LoRAs that are active merged; the pipeline stays as it is."""
    refuse_other_pipelines(pipeline)
    parts, lines = pipeline.components, list[str]()
    unet = _copy_model(UNet2DConditionModel, "unet", parts["unet"], dtype, lines)
    vae = other_vae or _copy_model(AutoencoderKL, "vae", parts["vae"], torch.float32, lines)
    text_encoder = _copy_model(CLIPTextModel, "text_encoder", parts["text_encoder"], dtype, lines)
    tokenizer, kind = deepcopy(parts["tokenizer"]), type(parts["scheduler"]).__name__
    scheduler = {**parts["scheduler"].config, "_class_name": kind}
    lines.append(f"tokenizer {json.dumps([tokenizer.get_vocab(), tokenizer.pad_token_id], sort_keys=True)}")
    lines.append(f"scheduler {_config_text(scheduler)}")
    sha256 = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return Parts(
        unet, vae, text_encoder, tokenizer, scheduler, {"class": type(pipeline).__name__, "sha256": sha256}
    )


def _copy_model(cls: Any, part: str, source: Any, dtype: torch.dtype, lines: list[str]) -> Any:
    """A model of its own with the weights of another, which may have hooks, processors or adapters.

    `lines` gets what it is made of, each weight by its digest.
    """
    model = _unwrapped(source)
    with torch.device("meta"):
        copy = cls(deepcopy(model.config)) if cls is CLIPTextModel else cls.from_config(model.config)
    digests, tensors = list[Any](), dict[str, Tensor]()
    with ThreadPoolExecutor() as pool:
        for name, tensor in _merged_weights(model, part):
            digests.append(pool.submit(_digest, f"{part}.{name}", tensor))
            tensors[name] = tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
        lines += sorted(digest.result() for digest in digests)
    lines.append(f"{part} {_config_text(model.config.to_dict() if cls is CLIPTextModel else model.config)}")
    expected = {name: value.shape for name, value in copy.state_dict().items()}
    if different := sorted(expected.items() ^ {name: value.shape for name, value in tensors.items()}.items()):
        raise UserError(f"the {part} of the pipeline is not as its configuration says, in {different[0][0]}")
    copy.load_state_dict(tensors, assign=True)
    for name, buffer in [*copy.named_buffers()]:
        if buffer.is_meta:  # those that are not saved
            path, _, own = name.rpartition(".")
            copy.get_submodule(path).register_buffer(
                own, model.get_buffer(name).detach().cpu().clone(), persistent=False
            )
    return copy


def _merged_weights(model: nn.Module, part: str) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model, by their names without LoRAs, of which those that are active are added."""
    adapted = {path: module for path, module in model.named_modules() if hasattr(module, "base_layer")}
    for name, tensor in model.state_dict().items():
        path, _, own = name.partition(".base_layer.")
        if any(name.startswith(f"{path}.") for path in adapted) and not own:
            continue  # of an adapter
        if tensor.is_meta or not (tensor.is_floating_point() or "position_ids" in name):
            raise UserError(
                f"the {part} of the pipeline has weights that are offloaded or quantised, such as {name}: "
                "expected them in memory, in float32, bfloat16 or float16"
            )
        value = tensor.detach()
        if own == "weight":
            value = value + _lora_delta(adapted[path], f"{part}.{path}").to(value)
        yield f"{path}.{own}" if own else name, value.cpu()


def _lora_delta(module: Any, name: str) -> Tensor:
    """What the active LoRAs add to a weight."""
    special = [*getattr(module, "lora_variant", {}), *filter(None, getattr(module, "lora_bias", {}).values())]
    if not hasattr(module, "lora_A") or special:
        raise UserError(f"the pipeline has an adapter at {name} that is not a LoRA, which is not supported")
    active = [] if module.merged or module.disable_adapters else module.active_adapters
    changes = [module.get_delta_weight(adapter).detach() for adapter in active if adapter in module.lora_A]
    return sum(changes, torch.zeros(()))


def _unwrapped(model: Any) -> Any:
    """The model inside a compiled one."""
    return getattr(model, "_orig_mod", model)


def _digest(name: str, tensor: Tensor) -> str:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


def _config_text(config: Mapping[str, Any]) -> str:
    """A configuration without what says where it is from and how it was loaded."""
    other = ("transformers_version", "dtype", "torch_dtype")
    own = {name: value for name, value in config.items() if not name.startswith("_") and name not in other}
    return json.dumps(own, sort_keys=True, default=str)
