"""ELITE by weights in the layout of its authors' files, against its paper."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import fits
import pytest
import torch
import torch.nn.functional as F
from fits import SOURCE, TARGET
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import kvinv_pl
from kvinv_pl.bench.methods import make
from kvinv_pl.bench.rows import Row
from kvinv_pl.bench.running import Encoded, run_method
from kvinv_pl.data.images.geometry import as_pixels
from kvinv_pl.errors import UserError
from kvinv_pl.models.published.elite import Elite

CPU = torch.device("cpu")
SEES, HIDDEN = 64, 24  # widths of the encoder, and inside the mapping's layers
LEVELS = ("last", 1, 2, 3, 4)  # of an encoder of six layers, as 4, 8, 12 and 16 are of one of 24


def mapping(wide: int, seed: int) -> dict[str, Tensor]:
    """The layers of a mapping network, by the names of its authors."""
    generator, found = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for level in range(5):
        for name in (f"mapping_{level}", f"mapping_patch_{level}"):
            shapes = {0: (HIDDEN, SEES), 1: (HIDDEN,), 3: (HIDDEN, HIDDEN), 4: (HIDDEN,), 6: (wide, HIDDEN)}
            for layer, shape in shapes.items():
                found[f"{name}.{layer}.weight"] = torch.randn(shape, generator=generator)
                found[f"{name}.{layer}.bias"] = torch.randn(shape[0], generator=generator)
    return found


def encoder() -> Any:
    """A small CLIP for pictures, of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config: Any = CLIPVisionConfig(
            hidden_size=SEES, intermediate_size=32, num_hidden_layers=6, num_attention_heads=1, image_size=16,
            patch_size=4, projection_dim=8,
        )  # fmt: skip
        return CLIPVisionModelWithProjection(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return kvinv_pl.load(str(fits.checkpoint()), accelerator="cpu", **fits.QUICK)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Image.Image:
    return fits.opened(fits.picture(tmp_path_factory.mktemp("picture") / "cat.png", (16, 12)))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The three files, as a method is told of them."""
    folder, generator = tmp_path_factory.mktemp("elite"), torch.Generator().manual_seed(7)
    wide = checkpoints.text_encoder("tiny").config.hidden_size
    weights = dict(checkpoints._unet("tiny").named_parameters())
    for n, name in enumerate(("global_mapper", "local_mapper")):
        tensors = mapping(wide, n)
        for key, weight in weights.items():
            path, _, projection = key.removesuffix(".weight").rpartition(".")
            if path.endswith("attn2") and projection in ("to_k", "to_v"):
                drawn = torch.randn(weight.shape, generator=generator) / wide**0.5
                tensors[f"{path.replace('.', '_')}_{projection}.weight"] = drawn
        torch.save(tensors, folder / f"{name}.pt")
    seen = {**encoder().state_dict(), "text_model.final_layer_norm.bias": torch.zeros(3)}
    torch.save(seen, folder / "clip.bin")
    files = {"global_mapper": "global_mapper.pt", "local_mapper": "local_mapper.pt", "clip": "clip.bin"}
    return {key: str(folder / file) for key, file in files.items()}


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """A mask of the picture's size."""
    mask = Image.new("L", (16, 12))
    mask.paste(255, (3, 2, 11, 9))
    return mask


def mapped(tensors: dict[str, Tensor], picture: Image.Image) -> Tensor:
    """What a mapping network makes of a picture, layer by layer: (levels, patches, e)."""
    square = picture.resize((16, 16), Image.Resampling.BICUBIC)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    out = encoder()(((as_pixels(square) + 1) / 2 - mean)[None] / std, output_hidden_states=True)
    seen = [out.last_hidden_state[0], *(out.hidden_states[n][0] for n in LEVELS[1:])]

    def layers(name: str, x: Tensor) -> Tensor:
        for first in (0, 3):
            x = F.linear(x, tensors[f"{name}.{first}.weight"], tensors[f"{name}.{first}.bias"])
            weight, bias = (tensors[f"{name}.{first + 1}.{each}"] for each in ("weight", "bias"))
            x = F.leaky_relu(F.layer_norm(x, (HIDDEN,), weight, bias), 0.01)
        return F.linear(x, tensors[f"{name}.6.weight"], tensors[f"{name}.6.bias"])

    found = [layers(f"mapping_{n}", x[:1]) + layers(f"mapping_patch_{n}", x[1:]) for n, x in enumerate(seen)]
    return torch.stack(found)


class Reading:
    """Cross-attention to the words and, of the last picture in the batch, to the object as well."""

    def __init__(self, key: Tensor, value: Tensor, place: int, strength: float) -> None:
        self.key, self.value, self.place, self.strength = key, value, place, strength

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any, **_: Any) -> Tensor:
        def apart(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q = apart(attn.to_q(hidden_states))
        k, v = (apart(to(encoder_hidden_states)) for to in (attn.to_k, attn.to_v))
        words = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1)
        out = words @ v
        of_word = words[-1, :, :, self.place, None]
        patches = (q[-1] @ apart(self.key[None])[0].transpose(-2, -1) * attn.scale).softmax(-1)
        seen = patches * of_word / of_word.max() * self.strength
        out = torch.cat([out[:-1], out[-1:] + seen @ apart(self.value[None])])
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@torch.no_grad()
def by_hand(
    model: Any, files: dict[str, str], picture: Image.Image, mask: Image.Image, strength: float
) -> Image.Image:
    """Sampling by diffusers' U-Net, with the keys and values of the two files."""
    own, local = (torch.load(files[name], weights_only=True) for name in ("global_mapper", "local_mapper"))
    encoded = Encoded.encode(model, picture)
    unet: Any = copy.deepcopy(encoded.denoiser.backbone.unet)
    black = Image.new("RGB", picture.size)
    inside = F.interpolate((as_pixels(mask.convert("RGB"))[None, :1] + 1) / 2, (128, 128))
    inside = F.interpolate(inside, (4, 4)).view(-1, 1)
    assert 0 < inside.mean() < 1
    object_words = mapped(local, Image.composite(picture, black, mask)).mean(0) * inside
    for path, layer in unet.named_modules():
        if path.endswith("attn2"):
            name, projections = path.replace(".", "_"), list[Tensor]()
            for projection in ("to_k", "to_v"):
                layer.get_submodule(projection).weight.copy_(own[f"{name}_{projection}.weight"])
                projections.append(object_words @ local[f"{name}_{projection}.weight"].T)
            key, value = projections
            layer.processor = Reading(key, value, 2, strength)  # < a S
    reader = encoded.denoiser.backbone.prompts
    word = mapped(own, picture)[0].mean(0)
    place = reader.tokens("S")[0].number
    table: Any = reader.text_encoder.get_input_embeddings()
    vector = table.weight[place].clone()
    table.weight[place] = word
    nothing, told = reader.embed(["", "a S running"])
    table.weight[place] = vector
    steps = encoded.scene(SOURCE, TARGET, 5.0).table
    z = torch.randn(encoded.z_0.shape, generator=torch.Generator().manual_seed(0))
    for i in range(3):
        given = torch.stack([nothing, told])
        free, bound = unet(z.expand(2, -1, -1, -1), steps.timesteps[i], given).sample.split(1)
        z = steps.forward(z, free + 5.0 * (bound - free), i)
    return encoded.decode(z)


def test_it_samples_with_the_word_and_the_object_of_the_picture(
    published: dict[str, str], model: Any, picture: Image.Image, mask: Image.Image
) -> None:
    found = {}
    before = copy.deepcopy(Encoded.encode(model, picture).denoiser.backbone.unet.state_dict())
    for strength in (0.8, 0.0):
        method = make("elite", "whole", **published, mask_given=True, strength=strength)
        found[strength] = run_method(model, picture, SOURCE, TARGET, editor=method, mask=mask)
        expected = by_hand(model, published, picture, mask, strength)
        assert found[strength].size == (16, 12) and fits.levels(found[strength], expected) < 1
    assert fits.levels(found[0.8], found[0.0]) > 0
    after = Encoded.encode(model, picture).denoiser.backbone.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_without_a_mask_the_object_is_what_the_model_finds_by_its_word(
    published: dict[str, str], model: Any, picture: Image.Image, mask: Image.Image
) -> None:
    method = make("elite", "whole", **published)
    found = run_method(model, picture, SOURCE, TARGET, editor=method)
    given = replace(method, mask_given=True)
    assert found.size == (16, 12)
    assert fits.levels(found, run_method(model, picture, SOURCE, TARGET, editor=given, mask=mask)) > 0
    with pytest.raises(UserError, match="mask_given: expected a mask with the picture, got none"):
        run_method(model, picture, SOURCE, TARGET, editor=given)
    with pytest.raises(UserError, match="source: expected a prompt, by whose word the object is found"):
        run_method(model, picture, "", TARGET, editor=make("elite", "whole", **published, word="cat"))


def test_its_row_is_typed_with_its_files_and_has_the_published_defaults() -> None:
    row = Row.parse(
        'elite(global_mapper="global_mapper.pt", local_mapper="local_mapper.pt", mask_given=True)@16'
    )
    shown: Any = row.make_methods()[1]
    assert (shown.global_mapper, shown.mask_given, shown.strength) == ("global_mapper.pt", True, 0.8)
    assert (shown.guidance, shown.token) == (5.0, "S")


def test_without_its_weights_or_with_others_it_is_refused_in_one_line(
    published: dict[str, str], model: Any, picture: Image.Image, tmp_path: Path
) -> None:
    def refused(match: str, files: dict[str, str], **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            run_method(model, picture, SOURCE, TARGET, editor=make("elite", "whole", **{**files, **options}))

    none = {**published, "local_mapper": str(tmp_path / "none.pt")}
    refused(r"there is no file .*none\.pt; expected ELITE's local_mapper\.pt", none)
    refused(
        r"has no weights mapping_0\.\*; expected ELITE's global", {**published, "global_mapper": none["clip"]}
    )
    refused("has no weights vision_model", {**published, "clip": published["local_mapper"]})
    with pytest.raises(UserError, match="mask: expected white where the object is, got none"):
        method = make("elite", "whole", **published, mask_given=True)
        run_method(model, picture, SOURCE, TARGET, editor=method, mask=Image.new("L", (16, 12)))
    tensors = torch.load(published["global_mapper"], weights_only=True)
    lacking = {name: x for name, x in tensors.items() if not name.endswith("attn2_to_k.weight")}
    torch.save(lacking, tmp_path / "lacking.pt")
    other = {**published, "global_mapper": str(tmp_path / "lacking.pt")}
    refused(r"has other cross-attentions than this model: .* Stable Diffusion 1\.4", other)
    with pytest.raises(UserError, match="mask: expected 16x12 pixels, as the picture has, got 8x8"):
        method = make("elite", "whole", **published, mask_given=True)
        run_method(model, picture, SOURCE, TARGET, editor=method, mask=Image.new("L", (8, 8)))
    refused("'dog' is not in the prompt", published, word="dog")
    with pytest.raises(UserError, match="strength: expected 0 or more, got -1"):
        make("elite", "whole", strength=-1)
    cut = {name: x for name, x in tensors.items() if name != "mapping_4.6.bias"}
    torch.save(cut, tmp_path / "cut.pt")
    with pytest.raises(UserError, match=r"is another network; expected ELITE's global_mapper\.pt"):
        Elite.load(str(tmp_path / "cut.pt"), published["local_mapper"], CPU)
    with pytest.raises(UserError, match="token: expected a word of one token, got 'catdog'"):
        run_method(model, picture, SOURCE, TARGET, editor=make("elite", "whole", **published, token="catdog"))


def test_what_does_not_fit_the_model_is_told_before_clip_is_fetched(
    published: dict[str, str], model: Any, tmp_path: Path
) -> None:
    tensors = torch.load(published["local_mapper"], weights_only=True)
    torch.save({name: x for name, x in tensors.items() if "attn2" not in name}, tmp_path / "other.pt")
    method = make(
        "elite", "whole", **{**published, "local_mapper": str(tmp_path / "other.pt"), "clip": "none"}
    )
    with pytest.raises(UserError, match=r"other\.pt has other cross-attentions"):
        method.prepare(model)
    with pytest.raises(UserError, match="there is no file none; expected CLIP"):
        replace(method, local_mapper=published["local_mapper"]).prepare(model)


def test_the_word_may_be_written_with_other_capitals(
    published: dict[str, str], model: Any, picture: Image.Image
) -> None:
    found = [
        run_method(model, picture, SOURCE, TARGET, editor=make("elite", "whole", **published, word=word))
        for word in ("cat", "Cat")
    ]
    assert fits.levels(*found) == 0


def test_a_mask_is_for_methods_that_take_one(model: Any, picture: Image.Image, mask: Image.Image) -> None:
    for editor in ("plain", "kv_inversion", make("kv_inversion", "whole")):
        with pytest.raises(UserError, match=r"mask: expected none with|takes none"):
            run_method(model, picture, SOURCE, TARGET, editor=editor, mask=mask)
