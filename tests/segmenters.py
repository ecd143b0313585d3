"""A tiny SAM with random weights, in a folder as transformers saves the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import SamConfig, SamModel, SamProcessor
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from kvinv_pl.models.checkpoints.loading import quiet

SIZE = 32  # pixels a side


def make(folder: Path) -> Path:
    """A SAM in a folder that is not there yet; its masks are neither empty nor full."""
    width: dict[str, Any] = {"hidden_size": 16, "image_size": SIZE, "patch_size": 4}
    parts: dict[str, Any] = {
        "vision_config": {
            **width, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 32,
            "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 8, "initializer_range": 0.5,
        },
        "prompt_encoder_config": width,
        "mask_decoder_config": {
            "hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
        },
    }  # fmt: skip
    square: Any = {"height": SIZE, "width": SIZE}
    longest: Any = {"longest_edge": SIZE}
    images = SamImageProcessorPil(size=longest, pad_size=square, mask_size=longest, mask_pad_size=square)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(1)
        SamModel(SamConfig(**parts, initializer_range=0.5)).save_pretrained(folder)
        SamProcessor(images).save_pretrained(folder)
    return folder


def make_second(folder: Path) -> Path:
    """A SAM 2 in a folder that is not there yet; needs torchvision."""
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model, Sam2Processor

    backbone: dict[str, Any] = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 16, "num_attention_heads": 1,
        "image_size": [2 * SIZE, 2 * SIZE], "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [16, 32, 64, 128], "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_positional_embedding_background_size": [4, 4], "window_size_per_stage": [4, 2, 2, 2],
        "global_attention_blocks": [3],
    }  # fmt: skip
    parts: dict[str, Any] = {
        "vision_config": {
            "backbone_config": backbone, "backbone_channel_list": [128, 64, 32, 16],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 32,
        },
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 2 * SIZE, "patch_size": 16},
        "mask_decoder_config": {
            "hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
        },
    }  # fmt: skip
    square: Any = {"height": 2 * SIZE, "width": 2 * SIZE}
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        Sam2Model(Sam2Config(**parts)).save_pretrained(folder)
        Sam2Processor(Sam2ImageProcessor(size=square)).save_pretrained(folder)
    return folder
