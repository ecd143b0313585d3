"""What is known of the U-Nets of Stable Diffusion 1 and 2: the names of their parts, and their conditioning.

Nothing else in the package knows these names; another kind of network gets a file like this one.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvinv_pl.errors import UserError

PRESETS = {
    "encoder": re.compile(r"down_blocks\..*"),
    "middle": re.compile(r"mid_block\..*"),
    "decoder": re.compile(r"up_blocks\..*"),
    "all": re.compile(r".*"),
}
"""The parts of a U-Net by their names in `target_modules`, as patterns of whole module paths."""
BLOCK_LISTS = ["down_blocks", "up_blocks"]
CONVOLUTION = re.compile(r"(?P<block>up_blocks\.\d+)\.resnets\.(?P<layer>\d+)\.conv2")
"""What a layer of the decoder adds to its input."""
CONDITIONS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim")


def in_decoder(paths: Sequence[str]) -> list[str]:
    """The module paths in the decoder; all of them if none is."""
    return [path for path in paths if PRESETS["decoder"].match(path)] or list(paths)


def decoder_layers(paths: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Its layers by the module paths of a U-Net: the last convolution, and the self-attentions after it."""
    found = [(path, CONVOLUTION.fullmatch(path)) for path in paths]
    layers = {
        path: rf"{match['block']}\.attentions\.{match['layer']}\..*\.attn1" for path, match in found if match
    }
    return [
        (path, [other for other in paths if re.fullmatch(after, other)]) for path, after in layers.items()
    ]


def refuse_other_conditions(config: Mapping[str, Any], name: str = "this U-Net") -> None:
    """Refuse a U-Net with more conditioning than z, t and a prompt, as SDXL's and LCMs' have."""
    if config.get("encoder_hid_dim_type") == "ip_image_proj":
        raise UserError(
            f"{name} has an IP-Adapter, which reads a second picture: save it after unload_ip_adapter()"
        )
    if config.get("attention_type", "default") != "default":
        raise UserError(
            f"{name} has attention_type {config['attention_type']!r}, as GLIGEN, which reads boxes: expected "
            "a model of text to image"
        )
    if extra := [f"{key}={config[key]!r}" for key in CONDITIONS if config.get(key) is not None]:
        raise UserError(
            f"{name} needs more than a latent, a time and a prompt ({', '.join(extra)}): "
            "only models of the Stable Diffusion 1 and 2 kind are supported"
        )
