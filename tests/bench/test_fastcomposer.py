"""FastComposer by weights in the layout of its authors' file, against its paper."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import fits
import pytest
import torch
import torch.nn.functional as F
from fits import SOURCE, TARGET
from PIL import Image, ImageOps
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import kvinv_pl
from kvinv_pl.bench.methods import make
from kvinv_pl.bench.rows import Row
from kvinv_pl.bench.running import Encoded, run_method
from kvinv_pl.data.images.geometry import as_pixels
from kvinv_pl.errors import UserError
from kvinv_pl.models.published.fastcomposer import FastComposer

WIDTH = 16  # of a word's embedding, and of a picture's
JOINED = {
    "mlp1.layernorm": (2 * WIDTH,), "mlp1.fc1": (WIDTH, 2 * WIDTH), "mlp1.fc2": (WIDTH, WIDTH),
    "mlp2.layernorm": (WIDTH,), "mlp2.fc1": (WIDTH, WIDTH), "mlp2.fc2": (WIDTH, WIDTH),
    "layer_norm": (WIDTH,),
}  # fmt: skip
"""Of the module that joins words and pictures, as its authors name its layers: their weights' shapes."""
CPU = torch.device("cpu")


def networks() -> dict[str, Any]:
    """Those in the file, of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        vision: Any = CLIPVisionConfig(
            hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1, image_size=16,
            patch_size=8, projection_dim=WIDTH,
        )  # fmt: skip
        found = {"unet": checkpoints._unet("tiny"), "text_encoder": checkpoints.text_encoder("tiny")}
        found |= {"image_encoder": CLIPVisionModelWithProjection(vision), "vae": checkpoints._vae("tiny")}
        return {name: net.eval() for name, net in found.items()}


def layers() -> dict[str, Tensor]:
    generator, found = torch.Generator().manual_seed(6), dict[str, Tensor]()
    for name, shape in JOINED.items():
        found[f"{name}.weight"] = torch.randn(shape, generator=generator)
        found[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    return found


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the layout of the published one, in which the text model's layers have no further name."""
    file = tmp_path_factory.mktemp("fastcomposer") / "pytorch_model.bin"
    tensors = {f"postfuse_module.{name}": tensor for name, tensor in layers().items()}
    for part, net in networks().items():
        for name, tensor in net.state_dict().items():
            tensors[f"{part}.{name.removeprefix('text_model.')}"] = tensor
    tensors["text_encoder.embeddings.position_ids"] = torch.arange(24)[None]
    tensors["image_encoder.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    torch.save(tensors, file)
    return file


@pytest.fixture(scope="module")
def model() -> Any:
    return kvinv_pl.load(str(fits.checkpoint()), accelerator="cpu", **fits.QUICK)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Image.Image:
    return fits.opened(fits.picture(tmp_path_factory.mktemp("picture") / "cat.png", (16, 12)))


def by_hand(word: Tensor, picture: Image.Image, encoder: Any) -> Tensor:
    """The word's embedding with the picture's, by the layers one after another."""
    own = layers()

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape, own[f"{name}.weight"], own[f"{name}.bias"])

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, own[f"{name}.weight"], own[f"{name}.bias"])

    square = ImageOps.pad(picture, (16, 16), Image.Resampling.BILINEAR)  # black above and below
    assert square.getpixel((8, 0)) == (0, 0, 0) != square.getpixel((8, 8))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    seen = encoder(((as_pixels(square) + 1) / 2 - mean)[None] / std).image_embeds[0]
    x = word + linear("mlp1.fc2", F.gelu(linear("mlp1.fc1", norm("mlp1.layernorm", torch.cat([word, seen])))))
    x = x + linear("mlp2.fc2", F.gelu(linear("mlp2.fc1", norm("mlp2.layernorm", x))))
    return norm("layer_norm", x)


@torch.no_grad()
def test_it_samples_with_the_picture_in_the_word_after_the_first_steps(
    published: Path, model: Any, picture: Image.Image
) -> None:
    method = make("fastcomposer", "whole", weights=str(published), delay=0.34)
    encoded, nets = Encoded.encode(model, picture), networks()
    before = {name: value.clone() for name, value in encoded.denoiser.backbone.unet.state_dict().items()}
    found = run_method(model, picture, SOURCE, TARGET, editor=method)

    reader = replace(encoded.denoiser.backbone.prompts, text_encoder=nets["text_encoder"])
    nothing, told = reader.embed(["", TARGET])
    with_picture = told.clone()
    with_picture[2] = by_hand(told[2], picture, nets["image_encoder"])  # < a cat
    table = encoded.scene(SOURCE, TARGET, 5.0).table
    z = torch.randn(encoded.z_0.shape, generator=torch.Generator().manual_seed(0))
    for i in range(3):
        read = torch.stack([nothing, told if i < 1 else with_picture])
        free, bound = nets["unet"](z.expand(2, -1, -1, -1), table.timesteps[i], read).sample.split(1)
        z = table.forward(z, free + 5.0 * (bound - free), i)
    assert found.size == (16, 12) and fits.levels(found, encoded.decode(z)) < 1
    after = encoded.denoiser.backbone.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    late = make("fastcomposer", "whole", weights=str(published), delay=1.0)
    assert fits.levels(found, run_method(model, picture, SOURCE, TARGET, editor=late)) > 0


def test_its_row_is_typed_with_its_file_and_has_the_published_defaults() -> None:
    row = Row.parse('fastcomposer(weights="pytorch_model.bin", word=cat)@16')
    shown: Any = row.make_methods()[1]
    assert (shown.weights, shown.word, shown.delay, shown.guidance) == ("pytorch_model.bin", "cat", 0.2, 5.0)


def test_without_its_weights_or_with_others_it_is_refused_in_one_line(
    published: Path, model: Any, picture: Image.Image, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"there is no file .*none\.bin; expected FastComposer's "):
        FastComposer.load(str(tmp_path / "none.bin"), CPU)
    tensors = torch.load(published, weights_only=True)

    def refused(other: dict[str, Tensor], match: str) -> None:
        torch.save(other, tmp_path / "other.bin")
        with pytest.raises(UserError, match=match):
            FastComposer.load(str(tmp_path / "other.bin"), CPU)

    refused(networks()["unet"].state_dict(), r"has no weights unet\.\*; expected FastComposer's")
    fewer = {name: tensor for name, tensor in tensors.items() if "mlp2.fc2" not in name}
    refused(fewer, "is another network; expected FastComposer's")
    other = {name: tensor for name, tensor in tensors.items() if name != "unet.conv_in.weight"}
    torch.save(other, tmp_path / "another.bin")
    method = make("fastcomposer", "whole", weights=str(tmp_path / "another.bin"))
    with pytest.raises(UserError, match=r"fits another unet than this model has: .* Stable Diffusion 1\.5"):
        run_method(model, picture, SOURCE, TARGET, editor=method)
    with pytest.raises(UserError, match="'dog' is not in the prompt"):
        method = make("fastcomposer", "whole", weights=str(published), word="dog")
        run_method(model, picture, SOURCE, TARGET, editor=method)
    with pytest.raises(UserError, match="delay: expected a share of the steps, 0 to 1, got 2"):
        make("fastcomposer", "whole", delay=2)
