"""Tiny Stable Diffusion folders with random weights, laid out as the real ones are.

Four kinds: "sd15" and "anything_v3" with SD 1.5's blocks, epsilon and files as old converters wrote them;
"sd21" with v-prediction and the OpenCLIP text model; "tiny", two levels and a VAE factor of 2, the quickest.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix import (
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from kvinv_pl.models.checkpoints.loading import quiet

Kind = Literal["sd15", "sd21", "anything_v3", "tiny"]
KINDS: tuple[Kind, ...] = get_args(Kind)

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FOUR_DOWN = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
FOUR_UP = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
WORDS = ["a", "cat", "dog", "horse", "standing", "sitting", "running", "jumping", "on", "the", "grass", "red"]

_home = Path(tempfile.mkdtemp(prefix="kvinv-checkpoints-"))
atexit.register(shutil.rmtree, _home, ignore_errors=True)


def make(kind: Kind, folder: Path | str) -> Path:
    """The checkpoint folder/kind; built once a session, copied after that. Copy it before damaging it."""
    built, target = _home / kind, Path(folder) / kind
    if not built.exists():
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(KINDS.index(kind))
            _build(kind, built)
    if not target.exists():
        shutil.copytree(built, target)
    return target


def clip(folder: Path) -> Path:
    """A CLIP of random weights in a folder, which reads the words of the others."""
    text = {**text_encoder("tiny").config.to_dict(), "projection_dim": 8}
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        config: Any = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        CLIPModel(config).save_pretrained(folder)
        tokenizer("tiny").save_pretrained(folder)
    return folder


def instructed(folder: Path) -> Path:
    """An InstructPix2Pix of random weights in a folder: its U-Net has twice the channels of a latent."""
    nothing: Any = None
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        StableDiffusionInstructPix2PixPipeline(
            vae=_vae("tiny"),
            text_encoder=text_encoder("tiny"),
            tokenizer=tokenizer("tiny"),
            unet=_unet("tiny", 8),
            scheduler=_scheduler("tiny"),
            safety_checker=nothing,
            feature_extractor=nothing,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def tokens() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary in CLIP's order and the merges that make one token of each word."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {piece: n for n, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return vocabulary, merges


def _build(kind: Kind, folder: Path) -> None:
    nothing: Any = None
    StableDiffusionPipeline(
        vae=_vae(kind),
        text_encoder=text_encoder(kind),
        tokenizer=tokenizer(kind),
        unet=_unet(kind),
        scheduler=_scheduler(kind),
        safety_checker=nothing,
        feature_extractor=nothing,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    if kind == "sd15":
        _age(folder)
    if kind == "anything_v3":  # what the first converters wrote
        change_json(folder / "unet" / "config.json", _diffusers_version="0.8.0.dev0", sample_size=32)


def _unet(kind: Kind, in_channels: int = 4) -> UNet2DConditionModel:
    common: dict[str, Any] = {"norm_num_groups": 8, "cross_attention_dim": 16}
    heads: Any
    if kind == "tiny":
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=in_channels,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            attention_head_dim=2,
            **common,
        )
    heads, linear, size = ([2, 4, 4, 4], True, 96) if kind == "sd21" else (4, False, 64)
    return UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(32, 32, 32, 32),
        down_block_types=FOUR_DOWN,
        up_block_types=FOUR_UP,
        attention_head_dim=heads,
        use_linear_projection=linear,
        **common,
    )


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    """SD 1.5's blocks, four levels, hardly any channels, frozen; always the same weights."""
    config: dict[str, Any] = {
        "block_out_channels": (8, 16, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**config, **changes}).eval().requires_grad_(False)


def _vae(kind: Kind) -> AutoencoderKL:
    levels = 2 if kind == "tiny" else 4
    blocks: dict[str, Any] = {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return AutoencoderKL(**blocks, norm_num_groups=4, latent_channels=4, sample_size=512)


def text_encoder(kind: Kind) -> CLIPTextModel:
    vocabulary, _ = tokens()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1 if kind == "tiny" else 2,
        num_attention_heads=2,
        max_position_embeddings=24 if kind == "tiny" else 77,
        hidden_act="gelu" if kind == "sd21" else "quick_gelu",
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
        pad_token_id=0 if kind == "sd21" else len(vocabulary) - 1,
    )
    return CLIPTextModel(config)


def tokenizer(kind: Kind) -> CLIPTokenizer:
    vocabulary: Any
    merges: Any
    vocabulary, merges = tokens()
    pad = "!" if kind == "sd21" else "<|endoftext|>"
    length = 24 if kind == "tiny" else 77
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=length)


def _scheduler(kind: Kind) -> Any:
    if kind == "sd15":
        return PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    if kind == "anything_v3":
        return DPMSolverMultistepScheduler(**BETAS, steps_offset=1)
    prediction = "v_prediction" if kind == "sd21" else "epsilon"
    ends: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return DDIMScheduler(**BETAS, **ends, prediction_type=prediction)


def _age(folder: Path) -> None:
    """Give SD 1.5's own files: old names of weights, a slow tokenizer's files, a short PNDM."""
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(weights)
    for new_name, old_name in old.items():
        tensors = {key.replace(f".{new_name}.", f".{old_name}."): tensor for key, tensor in tensors.items()}
    save_file(tensors, weights, metadata={"format": "pt"})

    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{key}": tensor for key, tensor in load_file(weights).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, weights, metadata={"format": "pt"})

    vocabulary, merges = tokens()
    tokenizer = folder / "tokenizer"
    for path in tokenizer.iterdir():
        path.unlink()
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (tokenizer / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    special["unk_token"] = "<|endoftext|>"
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(special))
    config = special | {"do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))

    scheduler = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **BETAS, "clip_sample": False}
    scheduler |= {"num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True}
    scheduler |= {"steps_offset": 1, "trained_betas": None}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


def change_json(path: Path, **changes: Any) -> None:
    """Set some fields of a configuration."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cached(repository: str, cache: Path) -> Path:
    """The empty folder of a repository in the hub's cache."""
    commit, place = "0" * 40, cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots" / commit).mkdir(parents=True)
    return place / "snapshots" / commit
