"""Stage `export`: the trained parts as an ordinary Stable Diffusion folder, with the judge, SAM and CLIP."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, SamModel, SamProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging as transformers_logging

from kvinv_pl.errors import UserError
from kvinv_pl.menagerie.classifier import FILE
from menagerie_training.autoencoder import round_trip
from menagerie_training.denoiser import build_scheduler
from menagerie_training.loop import needed
from menagerie_training.pictures import CHOOSING_SEED, drawn, psnr, unit

CASES, TOLERANCE = 48, 0.05  # pictures, and decibels that half precision may cost


def half_if_faithful(vae: AutoencoderKL) -> AutoencoderKL:
    """The autoencoder in fp16, unless rounding its weights costs more than the tolerance."""
    rgb, mask = drawn(range(CHOOSING_SEED, CHOOSING_SEED + CASES), vae.config["sample_size"])
    half: Any = copy.deepcopy(vae).half()
    rounded: Any = copy.deepcopy(half).float()
    figures = []
    for name, model in (("fp32", vae), ("fp16", rounded)):
        y = round_trip(model, rgb)
        figures.append((psnr(unit(rgb), y).mean().item(), psnr(unit(rgb), y, mask).mean().item()))
        print(f"autoencoder with {name} weights: {figures[-1][0]:.2f} dB, animal {figures[-1][1]:.2f} dB")
    if all(abs(a - b) <= TOLERANCE for a, b in zip(*figures, strict=True)):
        return half
    print(f"fp16 differs by more than {TOLERANCE} dB: the autoencoder is written in fp32")
    return vae


def clean(folder: Path) -> None:
    """Make the configurations say nothing of where they came from, and load in fp32 whatever is stored.

    Without the second, transformers would build the text model in fp16 beside a U-Net in fp32.
    """
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            part.pop("_name_or_path", None)
            if "dtype" in part:
                part["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def export(work: Path, to: Path) -> None:
    """Write unet, vae and text_encoder as fp16 safetensors into `to`, with all that belongs to them."""
    unet_file = needed(work / "unet-trained" / "diffusion_pytorch_model.safetensors", "unet")
    text_file = needed(work / "text-trained" / "model.safetensors", "unet")
    tokenizer_file = needed(work / "tokenizer" / "tokenizer.json", "unet")
    vae_file = needed(work / "vae-trained" / "diffusion_pytorch_model.safetensors", "vae")
    further = work / "decoder-trained" / vae_file.name
    vae_file = further if further.exists() else vae_file
    judge_file = needed(work / "judge-trained" / FILE, "judge")
    if to.exists() and not (to / "model_index.json").exists() and (to.is_file() or any(to.iterdir())):
        raise UserError(f"--to {to} is neither an earlier export nor an empty folder; give another")
    for library in (transformers_logging, diffusers_logging):
        library.disable_progress_bar()
    unet: Any = UNet2DConditionModel.from_pretrained(unet_file.parent)
    vae: Any = AutoencoderKL.from_pretrained(vae_file.parent)
    text = CLIPTextModel.from_pretrained(text_file.parent)
    nothing: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        StableDiffusionPipeline(
            vae=half_if_faithful(vae),
            text_encoder=text.half(),
            tokenizer=CLIPTokenizer.from_pretrained(tokenizer_file.parent),
            unet=unet.half(),
            scheduler=cast(Any, build_scheduler()),
            safety_checker=nothing,
            feature_extractor=nothing,
            requires_safety_checker=False,
        ).save_pretrained(to, safe_serialization=True)
    segmenter = work / "sam-trained"
    if (segmenter / "model.safetensors").exists():
        sam: Any = SamModel.from_pretrained(segmenter)
        sam.half().save_pretrained(to / "sam")
        SamProcessor.from_pretrained(segmenter).save_pretrained(to / "sam")
    else:
        print(f"no SAM goes along: {segmenter} has none, which the stage sam writes")
    contrastive = work / "clip-trained"
    if (contrastive / "model.safetensors").exists():
        clip: Any = CLIPModel.from_pretrained(contrastive)
        clip.half().save_pretrained(to / "clip")
        CLIPTokenizer.from_pretrained(contrastive).save_pretrained(to / "clip")
        CLIPImageProcessorPil.from_pretrained(contrastive).save_pretrained(to / "clip")
    else:
        print(f"no CLIP goes along: {contrastive} has none, which the stage clip writes")
    clean(to)
    shutil.copyfile(judge_file, to / FILE)
    records = [work / stage / "settings.json" for stage in ("vae", "unet", "decoder", "judge", "sam", "clip")]
    recipe = {path.parent.name: json.loads(path.read_text())["settings"] for path in records if path.exists()}
    (to / "training.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
    print(f"{to}: {size / 2**20:.1f} MiB")
