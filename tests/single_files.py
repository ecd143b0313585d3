"""Checkpoints in one file with the original names of their tensors, as model sites have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from kvinv_pl.models.checkpoints.families import CONFIGS, clip_tokenizer
from kvinv_pl.models.checkpoints.loading import quiet

Family = Literal["sd1", "sd2"]
FAMILIES: tuple[Family, ...] = ("sd1", "sd2")
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
OUTSIDE = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
OUTSIDE |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def folder(family: Family, place: Path) -> Path:
    """A checkpoint with the family's blocks, heads and tokenizer, as thin as its group norms allow."""
    config = json.loads((CONFIGS / f"{family}.json").read_text())
    unit = 64 if family == "sd2" else 32
    heads = {"attention_head_dim": [1, 1, 2, 2]} if family == "sd2" else {}
    widths = {"block_out_channels": [unit, unit, 2 * unit, 2 * unit], "cross_attention_dim": 64}
    size = {"sample_size": 96 if family == "sd2" else 64}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "num_hidden_layers": 2}
    unet: dict[str, Any] = _plain(config["unet"]) | widths | heads | size
    vae: dict[str, Any] = _plain(config["vae"]) | {"block_out_channels": [32, 32, 64, 64]}
    scheduler: Any = DDIMScheduler.from_config(config["scheduler"])
    nothing: Any = None
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(FAMILIES.index(family))
        StableDiffusionPipeline(
            vae=AutoencoderKL(**vae),
            text_encoder=CLIPTextModel(CLIPTextConfig(**config["text_encoder"] | text)),
            tokenizer=clip_tokenizer(config["pad_token"]),
            unet=UNet2DConditionModel(**unet),
            scheduler=scheduler,
            safety_checker=nothing,
            feature_extractor=nothing,
            requires_safety_checker=False,
        ).save_pretrained(place)
    return place


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def tensors(place: Path, family: Family) -> dict[str, Tensor]:
    """All that a folder contains, under the original names."""
    with quiet():
        unet = UNet2DConditionModel.from_pretrained(place / "unet")
        vae = AutoencoderKL.from_pretrained(place / "vae")
        text = CLIPTextModel.from_pretrained(place / "text_encoder")
    found = {f"model.diffusion_model.{unet_name(name)}": value for name, value in unet.state_dict().items()}
    found |= {f"first_stage_model.{name}": value for name, value in vae_tensors(vae).items()}
    return {name: value.contiguous() for name, value in (found | text_tensors(text, family)).items()}


def unet_name(name: str) -> str:
    for new, old in OUTSIDE.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    block, *rest = name.split(".")
    if block == "mid_block":
        kind, number, *rest = rest
        at = 1 if kind == "attentions" else 2 * int(number)
        return ".".join(["middle_block", str(at), *_inner(kind, rest)])
    level, kind, number, *rest = rest
    if kind == "downsamplers":
        return ".".join(["input_blocks", str(3 * int(level) + 3), "0", "op", *rest[1:]])
    if kind == "upsamplers":
        at = 1 if int(level) == 0 else 2  # without attentions, it comes one place earlier
        return ".".join(["output_blocks", str(3 * int(level) + 2), str(at), *rest])
    side, at = (
        ("input_blocks", 3 * int(level) + 1) if block == "down_blocks" else ("output_blocks", 3 * int(level))
    )
    return ".".join([side, str(at + int(number)), "1" if kind == "attentions" else "0", *_inner(kind, rest)])


def _inner(kind: str, rest: list[str]) -> list[str]:
    return [RESNET[rest[0]], *rest[1:]] if kind == "resnets" else rest


def vae_tensors(vae: nn.Module) -> dict[str, Tensor]:
    """The tensors of a VAE in a file of its own."""
    return dict(_vae_tensor(name, value) for name, value in vae.state_dict().items())


def _vae_tensor(name: str, value: Tensor) -> tuple[str, Tensor]:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    if "mid_block.attentions.0." in name:
        for new, old in VAE_ATTENTION.items():
            name = name.replace(f"mid_block.attentions.0.{new}.", f"mid.attn_1.{old}.")
        return name, value[:, :, None, None] if value.ndim == 2 else value
    parts = name.split(".")
    if parts[1] == "down_blocks":
        kind = {"resnets": "block"}.get(parts[3])
        inner = [kind, *parts[4:]] if kind else ["downsample", *parts[5:]]
        return ".".join([parts[0], "down", parts[2], *inner]), value
    if parts[1] == "up_blocks":
        kind = {"resnets": "block"}.get(parts[3])
        inner = [kind, *parts[4:]] if kind else ["upsample", *parts[5:]]
        return ".".join([parts[0], "up", str(3 - int(parts[2])), *inner]), value
    return name, value


def text_tensors(text: nn.Module, family: Family) -> dict[str, Tensor]:
    state = {name.removeprefix("text_model."): value for name, value in text.state_dict().items()}
    if family == "sd1":
        return {f"cond_stage_model.transformer.text_model.{name}": value for name, value in state.items()}
    found: dict[str, Tensor] = {"logit_scale": torch.ones(()), "text_projection": torch.eye(64)}
    for name, value in state.items():
        if name.startswith("encoder.layers."):
            _, _, number, rest = name.split(".", 3)
            if ".k_proj." in name or ".v_proj." in name:
                continue
            if ".q_proj." in name:  # the three are one
                value = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
                rest = f"attn.in_proj_{rest.rpartition('.')[2]}"
            for new, old in {**OPEN_CLIP, "self_attn.out_proj": "attn.out_proj"}.items():
                rest = rest.replace(new, old)
            found[f"transformer.resblocks.{number}.{rest}"] = value
        else:
            name = name.replace("embeddings.token_embedding", "token_embedding")
            name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
            found[name.replace("final_layer_norm", "ln_final")] = value
    return {f"cond_stage_model.model.{name}": value for name, value in found.items()}
