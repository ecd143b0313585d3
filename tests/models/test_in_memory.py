"""A pipeline in memory: the same as its folder, copied, and known again by all that it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from checkpoints import make
from commands import kvinv
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig

import kvinv_pl
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.loading import quiet
from kvinv_pl.models.fingerprint import pipeline_fingerprints
from kvinv_pl.models.load_options import LoadOptions
from kvinv_pl.models.stable_diffusion import Backbone

PROMPTS = ["a cat running on the grass", "a dog"]
SETTINGS: dict[str, Any] = {**fits.QUICK, "steps": 1, "inner_steps": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("tiny", tmp_path_factory.mktemp("checkpoints"))


def pipeline(checkpoint: Path, **options: Any) -> Any:
    with quiet():
        return StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None, **options)


def states(backbone: Any) -> dict[str, torch.Tensor]:
    parts = ("unet", "vae", "text_encoder")
    return {f"{part}.{name}": v for part in parts for name, v in getattr(backbone, part).state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipeline_is_bit_for_bit_its_folder_and_stays_as_it_is(
    dtype: torch.dtype, checkpoint: Path
) -> None:
    pipe, theirs = pipeline(checkpoint), Backbone.load(str(checkpoint), dtype)
    before = {name: value.clone() for name, value in states(pipe).items()}
    ours = Backbone.load(pipe, dtype)
    copied = states(ours)
    for name, value in states(theirs).items():
        assert copied[name].dtype == value.dtype and torch.equal(copied[name], value), name
    assert torch.equal(ours.embed(PROMPTS), theirs.embed(PROMPTS))
    assert ours.step_table(5).record() == theirs.step_table(5).record()
    assert ours.sample_size == theirs.sample_size and not any(b.is_meta for b in ours.buffers())
    for value in ours.parameters():
        value.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in states(pipe).items())
    assert next(pipe.unet.parameters()).requires_grad


def lora(pipe: Any) -> None:
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda pipe: pipe.enable_attention_slicing(),
    "a weight": lambda pipe: pipe.unet.conv_out.weight.data.mul_(-1),
    "the VAE": lambda pipe: pipe.vae.decoder.conv_out.bias.data.add_(1),
    "the text model": lambda pipe: pipe.text_encoder.final_layer_norm.bias.data.add_(1e-3),
    "the schedule": lambda pipe: pipe.scheduler.register_to_config(beta_end=0.013),
    "a word": lambda pipe: pipe.tokenizer.add_tokens("<x>"),
    "a LoRA": lora,
}


def test_a_pipeline_is_known_again_whatever_was_changed_in_it(checkpoint: Path) -> None:
    found = dict[str, str]()
    for name, change in CHANGES.items():
        pipe = pipeline(checkpoint)
        change(pipe)
        found[name] = Backbone.load(pipe).identity["sha256"]
    assert len(set(found.values())) == len(CHANGES)
    plain = Backbone.load(pipeline(checkpoint)).identity
    assert plain == {
        "checkpoint": "pipeline in memory",
        "class": "StableDiffusionPipeline",
        "sha256": found["nothing"],
    }


def test_a_change_of_whatever_is_copied_is_seen_by_its_fingerprints(checkpoint: Path) -> None:
    found = list[str]()
    for change in CHANGES.values():
        pipe = pipeline(checkpoint)
        change(pipe)
        found.append(repr(pipeline_fingerprints(pipe)))
    assert len(set(found)) == len(CHANGES) and repr(pipeline_fingerprints(pipeline(checkpoint))) == found[0]


def test_loras_that_are_active_are_merged_as_diffusers_fuses_them(checkpoint: Path) -> None:
    pipe, fused, off = pipeline(checkpoint), pipeline(checkpoint), pipeline(checkpoint)
    for each in (pipe, fused, off):
        lora(each)
    fused.unet.fuse_lora()
    off.unet.disable_lora()
    plain, ours = Backbone.load(pipeline(checkpoint)), Backbone.load(pipe)
    expected = Backbone.load(fused)
    fused.unet.unload_lora()
    for name, value in fused.unet.state_dict().items():
        torch.testing.assert_close(ours.unet.state_dict()[name], value)
        torch.testing.assert_close(expected.unet.state_dict()[name], value)
    assert ours.identity["sha256"] != plain.identity["sha256"] == Backbone.load(off).identity["sha256"]


def test_what_is_chosen_goes_with_a_pipeline(checkpoint: Path) -> None:
    chosen = LoadOptions(vae=str(checkpoint), prediction_type="v_prediction")
    ours = Backbone.load(pipeline(checkpoint), torch.float32, chosen)
    assert ours.predicts_v and ours.identity["vae"] == str(checkpoint)
    with pytest.raises(UserError, match=r"--model\.variant: pipeline in memory has only one variant"):
        Backbone.load(pipeline(checkpoint), torch.float32, LoadOptions(variant="fp16"))


def test_what_is_refused_of_folders_is_refused_of_pipelines(checkpoint: Path) -> None:
    pipe = pipeline(checkpoint)
    for given, words in [
        (3, "expected a path, a hub id or a pipeline of diffusers, got int"),
        (pipe.unet, "got UNet2DConditionModel"),
    ]:
        with pytest.raises(UserError, match=words):
            kvinv_pl.load(given)
    for name, part, words in [
        ("text_encoder", pipe.vae, "text_encoder is AutoencoderKL, expected CLIPTextModel"),
        ("unet", None, "without a U-Net"),
        ("scheduler", None, "has no scheduler"),
        ("scheduler", FlowMatchEulerDiscreteScheduler(), "has no betas"),
    ]:
        other = pipeline(checkpoint)
        setattr(other, name, part)
        with pytest.raises(UserError, match=words):
            Backbone.load(other)
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(UserError, match="has an IP-Adapter"):
        Backbone.load(pipe)
    pipe = pipeline(checkpoint)
    pipe.vae.to("meta")
    with pytest.raises(UserError, match="the vae of the pipeline has weights that are offloaded"):
        Backbone.load(pipe)


def test_a_picture_is_tuned_and_edited_with_a_pipeline_and_not_gone_on_with_by_another(
    checkpoint: Path, tmp_path: Path
) -> None:
    image, out, pipe = fits.picture(tmp_path / "cat.png"), tmp_path / "run", pipeline(checkpoint)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    processors = dict(pipe.unet.attn_processors)
    kv = kvinv_pl.load(pipe, accelerator="cpu", **SETTINGS)
    edited = kv.tune(image, fits.SOURCE, out=out).edit(fits.TARGET)
    assert pipe.unet.attn_processors == processors
    again = kvinv_pl.load(pipe, accelerator="cpu", **SETTINGS)
    assert again.tune(image, fits.SOURCE, out=out).edit(fits.TARGET).tobytes() == edited.tobytes()
    CHANGES["a LoRA"](pipe)
    for loaded in (again, kvinv_pl.load(pipe, accelerator="cpu", **SETTINGS)):
        with pytest.raises(UserError, match=r"was made with another checkpoint \(sha256"):
            loaded.tune(image, fits.SOURCE, out=out)
    pipe.unet.disable_lora()
    assert again.tune(image, fits.SOURCE, out=out).edit(fits.TARGET).tobytes() == edited.tobytes()
    answer = kvinv("edit", "--run", out, "--target", "a dog")
    assert answer.code == 2 and "continue from Python with load(pipeline)" in answer.err, answer
