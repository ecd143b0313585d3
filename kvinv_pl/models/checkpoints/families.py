"""The families of Stable Diffusion, 1 and 2: the configurations of a file that comes without any.

The shapes of its tensors give the sizes, and configs/*.json what they cannot say.
"""

import gzip
import json
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.loading import REDOWNLOAD
from kvinv_pl.models.checkpoints.single_file import CLIP, OPEN_CLIP, UNET, VAE, Contents

CONFIGS = Path(__file__).with_name("configs")
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
OPEN_CLIP_LAYERS = 23  # Stable Diffusion 2 reads the last but one of OpenCLIP's 24
HEAD = 64  # the width of a head in both text models, and in the U-Net of the second family


def configurations(contents: Contents, prediction: str | None, needs_vae: bool = True) -> dict[str, Any]:
    """The configuration of every part, as diffusers' own folders have them, and the tokenizer's pad token.

    Args:
        contents: Of the file.
        prediction: epsilon or v_prediction; None: what the file says, or its family is known for.
        needs_vae: Whether a file without a VAE is refused.
    """
    contents.refuse_others()
    lacking = [] if contents.has(VAE) or not needs_vae else ["VAE (--model.vae takes one)"]
    if not (contents.has(CLIP) or contents.has(OPEN_CLIP)):
        lacking.append("text encoder")
    if lacking:
        raise UserError(f"{contents.path} has no {' and no '.join(lacking)}: expected a whole checkpoint")
    family = "sd2" if contents.has(OPEN_CLIP) else "sd1"
    found = _of_family(family)
    try:
        found["unet"] |= _unet(contents, by_width=family == "sd2")
        found["text_encoder"] |= _open_clip(contents) if family == "sd2" else _clip(contents)
        if contents.has(VAE):
            found["vae"] |= _vae(contents, VAE)
    except KeyError as error:
        raise UserError(f"{contents.path} is incomplete: it lacks {error}; {REDOWNLOAD}") from error
    found["scheduler"] |= _schedule(contents, family, prediction)
    if found["scheduler"]["prediction_type"] == "epsilon":
        found["unet"]["sample_size"] = 64  # 2-base, too; the models of 768 pixels predict v
    return found


def vae_configuration(contents: Contents) -> dict[str, Any]:
    """The configuration of the VAE in a file, which may be a VAE alone."""
    return _of_family("sd1")["vae"] | _vae(contents, VAE if contents.has(VAE) else "")


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """CLIP's tokenizer, which both families have; they pad with different tokens."""
    packed = (CONFIGS / "clip_merges.txt.gz").read_bytes()
    merges: Any = [tuple(line.split(" ")) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary: Any = {piece: n for n, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def _of_family(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))


def _unet(contents: Contents, by_width: bool) -> dict[str, Any]:
    shapes, block = contents.shapes, UNET + "input_blocks.{}."
    starts = [1]  # every level has two layers and a downsampler
    while block.format(starts[-1] + 3) + "0.in_layers.2.weight" in shapes:
        starts.append(starts[-1] + 3)
    widths = [shapes[block.format(n) + "0.in_layers.2.weight"][0] for n in starts]
    attends = [block.format(n) + "1.norm.weight" in shapes for n in starts]
    first = block.format(starts[attends.index(True)] if any(attends) else 1)
    return {
        "in_channels": shapes[block.format(0) + "0.weight"][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if attended else "DownBlock2D" for attended in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attended else "UpBlock2D" for attended in attends[::-1]],
        "cross_attention_dim": shapes[f"{first}1.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": len(shapes[f"{first}1.proj_in.weight"]) == 2,
        **({"attention_head_dim": [width // HEAD for width in widths]} if by_width else {}),
    }


def _vae(contents: Contents, prefix: str) -> dict[str, Any]:
    first = prefix + "encoder.down.{}.block.0.conv1.weight"
    widths = [contents.shapes[first.format(n)][0] for n in range(contents.count(first))]
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "latent_channels": contents.shapes[f"{prefix}decoder.conv_in.weight"][1],
    }


def _clip(contents: Contents) -> dict[str, Any]:
    model = CLIP + ("text_model." if contents.has(f"{CLIP}text_model.") else "")
    layer = model + "encoder.layers.{}.mlp.fc1.weight"
    return _text(contents, f"{model}embeddings.token_embedding.weight", layer, contents.count(layer))


def _open_clip(contents: Contents) -> dict[str, Any]:
    layer = OPEN_CLIP + "transformer.resblocks.{}.mlp.c_fc.weight"
    layers = min(contents.count(layer), OPEN_CLIP_LAYERS)
    return _text(contents, f"{OPEN_CLIP}token_embedding.weight", layer, layers)


def _text(contents: Contents, embedding: str, layer: str, layers: int) -> dict[str, Any]:
    vocabulary, width = contents.shapes[embedding]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_attention_heads": width // HEAD,
        "num_hidden_layers": layers,
        "intermediate_size": contents.shapes[layer.format(0)][0],
    }


def _schedule(contents: Contents, family: str, prediction: str | None) -> dict[str, Any]:
    """What the model predicts: as asked, as the file says, or (Stable Diffusion 1) epsilon."""
    declared = PREDICTIONS.get(contents.metadata.get("modelspec.prediction_type", ""))
    if declared is None and "v_pred" in contents.shapes:
        declared = "v_prediction"
    if prediction is None and declared is None and family == "sd2":
        raise UserError(
            f"{contents.path} is a Stable Diffusion 2 and does not say what it predicts: expected "
            "--model.prediction_type v_prediction (2.0 and 2.1 of 768 pixels and what was made of them) or "
            "epsilon (the base models of 512 pixels)"
        )
    found: dict[str, Any] = {"prediction_type": prediction or declared or "epsilon"}
    if "ztsnr" in contents.shapes:
        found |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return found
