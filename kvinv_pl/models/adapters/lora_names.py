"""The names of a LoRA's tensors, as kohya, diffusers and peft write them, and the layers that they mean."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import CLIPTextModel

LoraTarget = nn.Linear | nn.Conv2d
NamedLayers = dict[str, tuple[str, LoraTarget]]
# kohya: X.lora_down.weight, lora_up, lora_mid and X.alpha; peft: X.lora_A.weight and lora_B; diffusers before
# peft: X.lora.down.weight, X.lora_linear_layer.down.weight and, in attentions, processor.X_lora.down.weight
TENSOR = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?[._](down|up|mid|A|B)\.weight|\.(alpha))")
OLD = (
    (re.compile(r"\.processor\b"), ""),
    (re.compile(r"(self_attn)\.to_([qkv])$"), r"\1.\2_proj"),
    (re.compile(r"(self_attn)\.to_out$"), r"\1.out_proj"),
    (re.compile(r"\.to_out$"), ".to_out.0"),
)
# The names that Stable Diffusion's first code gives layers, which some LoRAs have. diffusers' own converter
# takes what begins with input_blocks_1 for one block, those of 10 and 11 too, so that convolutions of the 1.x
# models come to wrong places; here, each place is counted off the U-Net.
OUTSIDE = {"time_embedding.linear_1": "time_embed_0", "time_embedding.linear_2": "time_embed_2"}
OUTSIDE |= {"conv_in": "input_blocks_0_0", "conv_out": "out_2"}
MIDDLE = {"mid_block.resnets.0": "middle_block_0", "mid_block.attentions.0": "middle_block_1"}
MIDDLE |= {"mid_block.resnets.1": "middle_block_2"}
PLACES = {"resnets": 0, "attentions": 1}
INNER = {"conv1": "in_layers_2", "time_emb_proj": "emb_layers_1", "conv2": "out_layers_3"}
INNER |= {"conv_shortcut": "skip_connection"}
# what the name of a tensor contains, and what its file is then
UNSUPPORTED = {
    "dora_scale": "a DoRA, which is not supported",
    "lora_magnitude_vector": "a DoRA, which is not supported",
    "hada_": "a LoHa, which is not supported",
    "lokr_": "a LoKr, which is not supported",
    "oft_": "an OFT, which is not supported",
    "lora_te1_": "a LoRA for SDXL, which is not supported",
    "lora_te2_": "a LoRA for SDXL, which is not supported",
    "text_encoder_2.": "a LoRA for SDXL, which is not supported",
    "double_blocks": "a LoRA for FLUX, which is not supported",
    "model.diffusion_model.": "a checkpoint, which goes to --checkpoint",
    "emb_params": "a textual inversion, which goes to --model.embeddings",
}


def role_of(tensor: str) -> tuple[str, str]:
    """The layer, as its file spells it, and down, up, mid or alpha; no role where it is none of these."""
    found = TENSOR.fullmatch(tensor)
    if found is None:
        return tensor, ""
    layer, role = found[1], found[2] or found[3]
    for old, new in OLD:
        layer = old.sub(new, layer)
    return layer, {"A": "down", "B": "up"}.get(role, role)


def layers_by_name(unet: nn.Module, text_encoder: CLIPTextModel) -> NamedLayers:
    """Every layer under all names that files give it, and its own, which begins with unet or text_encoder."""
    found, blocks = NamedLayers(), _blocks_of(unet)
    for path, layer in _layers(unet):
        names = [f"lora_unet_{path.replace('.', '_')}", *_dotted("unet.", path)]
        if (first := _sgm_name(path, blocks)) is not None:
            names.append(f"lora_unet_{first}")
        found |= dict.fromkeys(names, (f"unet.{path}", layer))
    for path, layer in _layers(getattr(text_encoder, "text_model", text_encoder)):
        names = [f"lora_te_text_model_{path.replace('.', '_')}", *_dotted("text_encoder.", path)]
        names += _dotted("text_encoder.", f"text_model.{path}")
        found |= dict.fromkeys(names, (f"text_encoder.{path}", layer))
    return found


def _dotted(model: str, path: str) -> list[str]:
    return [f"{start}{path}" for start in (model, "base_model.model.", "")]


def _layers(model: nn.Module) -> Iterator[tuple[str, LoraTarget]]:
    for path, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            yield path, layer


def _blocks_of(unet: Any) -> dict[str, str]:
    """How the paths of layers begin in diffusers, and what stands for it, with underscores for dots."""
    found, at = OUTSIDE | MIDDLE, 1
    for level, block in enumerate(unet.down_blocks):
        for n in range(len(block.resnets)):
            for kind, place in PLACES.items():
                found[f"down_blocks.{level}.{kind}.{n}"] = f"input_blocks_{at}_{place}"
            at += 1
        if block.downsamplers:
            found[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks_{at}_0"
            at += 1
    at = 0
    for level, block in enumerate(unet.up_blocks):
        for n in range(len(block.resnets)):
            for kind, place in PLACES.items():
                found[f"up_blocks.{level}.{kind}.{n}"] = f"output_blocks_{at}_{place}"
            at += 1
        if block.upsamplers:  # in the last of them, after its attention where there is one
            after = 2 if hasattr(block, "attentions") else 1
            found[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks_{at - 1}_{after}"
    return found


def _sgm_name(path: str, blocks: dict[str, str]) -> str | None:
    """The name of a layer, with underscores for dots; None: it has none there."""
    start = next((start for start in blocks if f"{path}.".startswith(f"{start}.")), None)
    if start is None:
        return None
    inner = path[len(start) :].strip(".")
    if ".resnets." in path:
        inner = INNER[inner]
    elif ".downsamplers." in path:
        inner = "op"
    return "_".join(filter(None, (blocks[start], inner.replace(".", "_"))))
