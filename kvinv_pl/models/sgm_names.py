"""The names that Stable Diffusion's first code gives the layers of a U-Net, which some LoRAs have.

diffusers' own converter of a LoRA takes what begins with input_blocks_1 for one block, those of 10 and 11
too, so that convolutions of the 1.x models come to wrong places; here, each place is counted off the U-Net.
"""

from __future__ import annotations

from typing import Any

OUTSIDE = {"time_embedding.linear_1": "time_embed_0", "time_embedding.linear_2": "time_embed_2"}
OUTSIDE |= {"conv_in": "input_blocks_0_0", "conv_out": "out_2"}
MIDDLE = {"mid_block.resnets.0": "middle_block_0", "mid_block.attentions.0": "middle_block_1"}
MIDDLE |= {"mid_block.resnets.1": "middle_block_2"}
PLACES = {"resnets": 0, "attentions": 1}
INNER = {"conv1": "in_layers_2", "time_emb_proj": "emb_layers_1", "conv2": "out_layers_3"}
INNER |= {"conv_shortcut": "skip_connection"}


def blocks_of(unet: Any) -> dict[str, str]:
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


def sgm_name(path: str, blocks: dict[str, str]) -> str | None:
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
