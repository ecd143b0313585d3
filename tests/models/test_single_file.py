"""Checkpoints in one file: bit for bit their folders, offline; what is another kind of file is told."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from checkpoints import make
from commands import QUICK, kvinv
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from single_files import FAMILIES, Family, folder, tensors, unet_name
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoint import load_on_meta
from kvinv_pl.models.checkpoints.families import CONFIGS, clip_tokenizer, configurations
from kvinv_pl.models.checkpoints.single_file import UNET, Contents, read_contents
from kvinv_pl.models.load_options import DEFAULTS, LoadOptions
from kvinv_pl.models.stable_diffusion import Backbone

PROMPTS = ["a cat running on the grass", "Ünïcode, (tags:1.3), 8k!"]
every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def whole(family: Family) -> tuple[Path, dict[str, Tensor]]:
    """A folder, and its tensors under the original names."""
    place = folder(family, Path(mkdtemp(prefix="kvinv-")) / family)
    return place, tensors(place, family)


def file(place: Path, family: Family, *, without: str = "-", **metadata: str) -> Path:
    """The same as one file, without the tensors whose names begin so."""
    kept = {name: value for name, value in whole(family)[1].items() if not name.startswith(without)}
    save_file(kept, place, metadata=metadata or None)
    return place


def refused(path: Path, *words: str, options: LoadOptions = DEFAULTS, named: bool = True) -> None:
    with pytest.raises(UserError) as caught:
        Backbone.load(str(path), torch.float32, options)
    assert "\n" not in str(caught.value)
    for word in (*[str(path)] * named, *words):
        assert word in str(caught.value)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_bit_for_bit_the_folder_of_the_same_weights(
    family: Family, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = file(tmp_path / "model.safetensors", family)
    ours = Backbone.load(
        str(path), dtype, LoadOptions(prediction_type="v_prediction" if family == "sd2" else None)
    )
    theirs = Backbone.load(str(whole(family)[0]), dtype)
    for part in ("unet", "vae", "text_encoder"):
        got, expected = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
    assert torch.equal(ours.embed(PROMPTS), theirs.embed(PROMPTS))
    assert ours.predicts_v == theirs.predicts_v == (family == "sd2")
    assert ours.sample_size == theirs.sample_size and ours.multiple == theirs.multiple
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([981, 21])
    for weight in (*ours.unet.parameters(), *theirs.unet.parameters()):
        weight.data = weight.data.clone()  # where weights begin in a file, a CPU's last bit depends on it
    with torch.no_grad():
        expected = theirs.predict(z, t, theirs.embed(PROMPTS))
        assert torch.equal(ours.predict(z, t, ours.embed(PROMPTS)), expected)
    assert ours.step_table(5).record() == theirs.step_table(5).record()


@every_family
def test_the_sizes_that_are_read_off_a_file_of_true_size_are_the_familys_own(family: Family) -> None:
    config = json.loads((CONFIGS / f"{family}.json").read_text())
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config["unet"])
    shapes = {name: tuple(value.shape) for name, value in whole(family)[1].items()}
    shapes |= {UNET + unet_name(name): tuple(value.shape) for name, value in unet.state_dict().items()}
    found = configurations(Contents(Path("x"), shapes), config["scheduler"]["prediction_type"])
    assert found["unet"] == config["unet"] and found["scheduler"] == config["scheduler"]


def test_the_identity_of_a_file_is_its_own_digest(tmp_path: Path) -> None:
    path = file(tmp_path / "model.safetensors", "sd1")
    identity = Backbone.load(str(path)).identity
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert identity == {"checkpoint": str(path), "class": "StableDiffusionPipeline", "sha256": digest}


def test_what_a_second_generation_predicts_is_asked_where_the_file_does_not_say(tmp_path: Path) -> None:
    refused(
        file(tmp_path / "silent.safetensors", "sd2"), "--model.prediction_type", "v_prediction", "epsilon"
    )
    for said, size in [("v", 768), ("epsilon", 512)]:
        path = file(tmp_path / f"{said}.safetensors", "sd2", **{"modelspec.prediction_type": said})
        backbone = Backbone.load(str(path))
        assert backbone.predicts_v == (said == "v") and backbone.sample_size == (size, size)


def test_a_files_own_word_for_a_prediction_of_v_is_taken(tmp_path: Path) -> None:
    save_file(whole("sd1")[1] | {"v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    assert Backbone.load(str(tmp_path / "v.safetensors")).predicts_v
    other = LoadOptions(prediction_type="epsilon")
    assert not Backbone.load(str(tmp_path / "v.safetensors"), torch.float32, other).predicts_v


def test_the_tokenizer_is_clips() -> None:
    ids = clip_tokenizer("!")(["a photo of a cat", "Ünïcode, 8k!"])["input_ids"]
    assert ids[0] == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_a_pickled_file_is_refused_unless_asked_for_and_then_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": whole("sd1")[1], "epoch": 3}, path)
    refused(path, "can run code", "--model.allow_pickle true")
    ours = Backbone.load(str(path), torch.float32, LoadOptions(allow_pickle=True))
    assert torch.equal(ours.embed(PROMPTS), Backbone.load(str(whole("sd1")[0])).embed(PROMPTS))


def test_objects_in_a_pickle_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": whole("sd1")[1], "callbacks": read_contents}, path)
    refused(path, "objects other than tensors", options=LoadOptions(allow_pickle=True))


def test_a_text_encoder_whose_names_lack_a_part_is_read(tmp_path: Path) -> None:
    short = {name.replace(".text_model.", "."): value for name, value in whole("sd1")[1].items()}
    save_file(short, tmp_path / "merged.safetensors")
    ours = Backbone.load(str(tmp_path / "merged.safetensors"))
    assert torch.equal(ours.embed(PROMPTS), Backbone.load(str(whole("sd1")[0])).embed(PROMPTS))


@pytest.mark.parametrize("alone", [True, False])
def test_another_vae_takes_the_place_of_the_checkpoints_own(alone: bool, tmp_path: Path) -> None:
    other, names = tmp_path / "vae.safetensors", whole("sd2")[1]
    prefix = "first_stage_model."
    vae = {name: value for name, value in names.items() if name.startswith(prefix)}
    save_file({name.removeprefix(prefix) if alone else name: value for name, value in vae.items()}, other)
    bare = file(tmp_path / "bare.safetensors", "sd1", without=prefix)
    refused(bare, "has no VAE", "--model.vae")
    ours = Backbone.load(str(bare), torch.float32, LoadOptions(vae=str(other)))
    expected = Backbone.load(str(whole("sd2")[0])).vae.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.vae.state_dict().items())
    assert ours.identity["vae"] == str(other)
    with_folder = Backbone.load(str(whole("sd1")[0]), torch.float32, LoadOptions(vae=str(whole("sd2")[0])))
    assert torch.equal(
        with_folder.vae.state_dict()["encoder.conv_in.weight"], expected["encoder.conv_in.weight"]
    )
    assert len({Backbone.load(str(whole("sd1")[0])).identity["sha256"], with_folder.identity["sha256"]}) == 2


def test_clip_skip_is_diffusers_own_counted_from_one() -> None:
    place = whole("sd1")[0]
    text = CLIPTextModel.from_pretrained(place / "text_encoder")
    tokens = clip_tokenizer("<|endoftext|>")(PROMPTS, padding="max_length", return_tensors="pt")["input_ids"]
    # as encode_prompt of its pipeline does, which expects an older transformers
    expected = text.final_layer_norm(text(tokens, output_hidden_states=True).hidden_states[-2])
    skipped = Backbone.load(str(place), torch.float32, LoadOptions(clip_skip=2))
    plain = Backbone.load(str(place))
    assert torch.equal(skipped.embed(PROMPTS), expected)
    assert not torch.equal(plain.embed(PROMPTS), expected)
    assert skipped.identity["sha256"] != plain.identity["sha256"]
    refused(
        place,
        "--model.clip_skip: expected 1 to 2",
        "got 3",
        options=LoadOptions(clip_skip=3),
        named=False,
    )
    refused(
        place,
        "--model.clip_skip: expected 1 to 2",
        "got 0",
        options=LoadOptions(clip_skip=0),
        named=False,
    )


def test_what_is_no_vae_is_refused_as_one(tmp_path: Path) -> None:
    unet = whole("sd1")[0] / "unet"
    other = tmp_path / "other.safetensors"
    save_file({"lora_unet_mid.lora_up.weight": torch.zeros(2, 2)}, other)
    for vae, words in [
        (unet, f"{unet} contains UNet2DConditionModel; expected a VAE"),
        (other, f"{other} contains a LoRA"),
        (tmp_path / "nowhere", "there is no"),
        (tmp_path, "has no config.json"),
    ]:
        with pytest.raises(UserError, match=re.escape(words)):
            Backbone.load(str(whole("sd1")[0]), torch.float32, LoadOptions(vae=str(vae)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("conditioner.embedders.0.transformer.x", "SDXL"),
        ("model.diffusion_model.double_blocks.0.x", "FLUX"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("unet.up_blocks.0.attentions.0.to_q.lora.down.weight", "a LoRA"),
        ("model.diffusion_model.label_emb.0.0.weight", "SDXL or unCLIP"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("emb_params", "a textual inversion"),
        ("encoder.down.0.block.0.conv1.weight", "a VAE"),
        ("down_blocks.0.resnets.0.conv1.weight", "a U-Net alone"),
        ("something.else", "something.else"),
    ],
)
def test_a_file_of_another_kind_is_told_by_what_it_is(name: str, words: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", words, "expected a Stable Diffusion 1 or 2")


@pytest.mark.parametrize("keep", [0, 7, 2000, -1])
def test_a_file_that_is_cut_is_no_model(keep: int, tmp_path: Path) -> None:
    path = file(tmp_path / "cut.safetensors", "sd1")
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "cannot be read")


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    for name in ("model.diffusion_model.out.2.bias", "cond_stage_model.transformer.text_model.final_layer"):
        refused(file(tmp_path / "x.safetensors", "sd1", without=name))


def test_an_edit_takes_what_was_chosen_with_the_checkpoint_of_its_run(tmp_path: Path) -> None:
    checkpoint, out, picture = make("tiny", tmp_path), tmp_path / "out", tmp_path / "picture.png"
    text = CLIPTextConfig.from_pretrained(checkpoint / "text_encoder", num_hidden_layers=2)
    CLIPTextModel(text).save_pretrained(checkpoint / "text_encoder")
    vae = shutil.copytree(checkpoint / "vae", tmp_path / "vae")
    weights = vae / "diffusion_pytorch_model.safetensors"
    changed = {name: value * 1.1 for name, value in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    Image.new("RGB", (32, 32), "teal").save(picture)
    chosen = ("--model.vae", vae, "--model.prediction_type", "v_prediction", "--model.clip_skip", 2)
    chosen += ("--model.timestep_spacing", "trailing")
    fit = ("fit", "--checkpoint", checkpoint, "--image", picture, "--source", "a cat", "--out", out)
    fitted = kvinv(*fit, *chosen, *QUICK, "--model.required_psnr", 0)
    assert fitted.code == 0, fitted.err
    model = json.loads((out / "run.json").read_text())["model"]
    assert model["prediction_type"] == "v_prediction" and model["vae"] == str(vae)
    assert model["clip_skip"] == 2 and model["timestep_spacing"] == "trailing"
    edited = kvinv("edit", "--run", out, "--target", "a dog")
    assert edited.code == 0, edited.err
    for other in (("--model.vae", checkpoint), ("--model.clip_skip", 1)):
        answer = kvinv("edit", "--run", out, "--target", "a dog", *other)
        assert answer.code == 2 and "model" in answer.err, answer
    spaced = kvinv("edit", "--run", out, "--target", "a dog", "--model.timestep_spacing", "leading")
    assert spaced.code == 2 and "--model.timestep_spacing" in spaced.err, spaced


def test_the_self_attentions_of_a_file_are_shown_without_its_weights(tmp_path: Path) -> None:
    path = file(tmp_path / "model.safetensors", "sd1")
    unet, sizes, _ = load_on_meta(str(path))
    assert sizes.sample == (512, 512) and next(unet.parameters()).is_meta
    shown = kvinv("sites", "--checkpoint", path)
    assert shown.code == 0 and re.search(r"up_blocks\.3\.attentions\.2", shown.out)
    assert read_contents(path, allow_pickle=False).has(UNET)
    torch.save({"state_dict": whole("sd1")[1]}, pickled := tmp_path / "model.ckpt")
    for command in ("sites", "variants"):
        answer = kvinv(command, "--checkpoint", pickled)
        assert answer.code == 2 and "can run code" in answer.err
        taken = kvinv(command, "--checkpoint", pickled, "--allow_pickle", "true")
        assert taken.code == 0 and (
            command == "variants" or taken.out.replace(str(pickled), str(path)) == shown.out
        )
