"""The names of a LoRA's tensors, as kohya, diffusers and peft write them, and the layers that they mean."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from transformers import CLIPTextModel

from kvinv_pl.models.sgm_names import blocks_of, sgm_name

Changeable = nn.Linear | nn.Conv2d
Spelled = dict[str, tuple[str, Changeable]]
# kohya: X.lora_down.weight, lora_up, lora_mid and X.alpha; peft: X.lora_A.weight and lora_B; diffusers before
# peft: X.lora.down.weight, X.lora_linear_layer.down.weight and, in attentions, processor.X_lora.down.weight
TENSOR = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?[._](down|up|mid|A|B)\.weight|\.(alpha))")
OLD = (
    (re.compile(r"\.processor\b"), ""),
    (re.compile(r"(self_attn)\.to_([qkv])$"), r"\1.\2_proj"),
    (re.compile(r"(self_attn)\.to_out$"), r"\1.out_proj"),
    (re.compile(r"\.to_out$"), ".to_out.0"),
)
# what the name of a tensor contains, and what its file is then
OTHERS = {
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


def spelled(unet: nn.Module, text_encoder: CLIPTextModel) -> Spelled:
    """Every layer under all names that files give it, and its own, which begins with unet or text_encoder."""
    found, blocks = Spelled(), blocks_of(unet)
    for path, layer in _layers(unet):
        names = [f"lora_unet_{path.replace('.', '_')}", *_dotted("unet.", path)]
        if (first := sgm_name(path, blocks)) is not None:
            names.append(f"lora_unet_{first}")
        found |= dict.fromkeys(names, (f"unet.{path}", layer))
    for path, layer in _layers(getattr(text_encoder, "text_model", text_encoder)):
        names = [f"lora_te_text_model_{path.replace('.', '_')}", *_dotted("text_encoder.", path)]
        names += _dotted("text_encoder.", f"text_model.{path}")
        found |= dict.fromkeys(names, (f"text_encoder.{path}", layer))
    return found


def _dotted(model: str, path: str) -> list[str]:
    return [f"{start}{path}" for start in (model, "base_model.model.", "")]


def _layers(model: nn.Module) -> Iterator[tuple[str, Changeable]]:
    for path, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            yield path, layer
