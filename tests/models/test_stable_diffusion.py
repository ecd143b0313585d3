"""The backbone against diffusers' own pipeline, and against checkpoints that are not what it needs."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, cast

import fits
import huggingface_hub.constants
import pytest
import torch
from checkpoints import KINDS, Kind, change_json, make
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from kvinv_pl.algorithm.ddim import move
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoint import load_on_meta
from kvinv_pl.models.checkpoints.loading import quiet
from kvinv_pl.models.load_options import LoadOptions
from kvinv_pl.models.stable_diffusion import Backbone

PROMPTS = ["a cat running on the grass", "", "A red  horse, jumping!", "a dog " * 60]
Load: TypeAlias = Callable[[Kind], Backbone]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    """A tiny checkpoint of one's own, to be damaged."""
    return shutil.copytree(make("tiny", home), tmp_path / "tiny")


@pytest.fixture(scope="module")
def load(home: Path) -> Load:
    loaded: dict[Kind, Backbone] = {}

    def once(kind: Kind) -> Backbone:
        if kind not in loaded:
            loaded[kind] = Backbone.load(str(make(kind, home)))
        return loaded[kind]

    return once


def pipeline(folder: Path) -> StableDiffusionPipeline:
    with quiet():
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_kind
def test_pictures_that_are_not_square_become_latents_and_pictures_again(kind: Kind, load: Load) -> None:
    backbone = load(kind)
    h, w = backbone.multiple, 2 * backbone.multiple
    f = 2 if kind == "tiny" else 8
    pixels = normal(3, 3, h, w).clamp(-1, 1)
    z = backbone.encode(pixels)
    assert z.shape == (3, backbone.latent_channels, h // f, w // f) and z.dtype == torch.float32
    again = backbone.decode(z)
    assert again.shape == pixels.shape and again.abs().max() <= 1
    assert not z.requires_grad and not again.requires_grad


@every_kind
def test_encoding_is_the_scaled_mean_of_the_posterior_and_the_same_in_any_batch(
    kind: Kind, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load(kind)
    pixels = normal(3, 3, 64, 128).clamp(-1, 1)
    z = backbone.encode(pixels)
    with torch.no_grad():
        posterior: Any = backbone.vae.encode(pixels)
    torch.testing.assert_close(z, posterior.latent_dist.mean * backbone.vae.config["scaling_factor"])
    monkeypatch.setattr("kvinv_pl.models.stable_diffusion.PIXELS_AT_ONCE", 1)
    torch.testing.assert_close(backbone.encode(pixels), z)
    torch.testing.assert_close(backbone.decode(z), torch.cat([backbone.decode(row) for row in z.split(1)]))


@every_kind
def test_embeddings_are_those_of_the_pipeline(kind: Kind, home: Path, load: Load) -> None:
    with quiet():
        theirs = pipeline(make(kind, home)).encode_prompt(PROMPTS, torch.device("cpu"), 1, False)[0]
    ours = load(kind).embed(PROMPTS)
    assert ours.shape == (4, 24 if kind == "tiny" else 77, 16)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not torch.allclose(ours[0], ours[2])


@pytest.mark.parametrize("kind", ["sd15", "sd21", "tiny"])
def test_guided_sampling_by_our_move_is_the_output_of_the_pipeline(
    kind: Kind, home: Path, load: Load
) -> None:
    backbone, steps, w = load(kind), 4, 5.0
    assert backbone.predicts_v == (kind == "sd21")
    height = max(8, backbone.multiple)  # diffusers' pipeline wants multiples of 8
    width = 2 * height
    z_T = normal(1, 4, height // backbone.vae_factor, width // backbone.vae_factor)
    pipe = pipeline(make(kind, home))
    options: dict[str, Any] = {"guidance_scale": w, "num_inference_steps": steps, "output_type": "pt"}
    theirs = cast("Any", pipe(PROMPTS[0], height=height, width=width, latents=z_T, **options)).images

    prompt = backbone.embed(["", PROMPTS[0]])
    table, z = backbone.step_table(steps), z_T
    with torch.no_grad():
        for i, t in enumerate(table.timesteps):
            out_u, out_c = backbone.predict(torch.cat([z, z]), t.expand(2), prompt).chunk(2)
            z = table.forward(z, out_u + w * (out_c - out_u), i)
    ours = backbone.decode(z) / 2 + 0.5
    assert not torch.allclose(z, z_T, atol=0.1)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_v_prediction_is_stepped_along_as_the_epsilon_of_each_rows_own_timestep(load: Load) -> None:
    backbone = load("sd21")
    table, steps, z = backbone.step_table(4), torch.tensor([0, 3]), normal(2, 4, 8, 16)
    with torch.no_grad():
        v = backbone.predict(z, table.timesteps[steps], backbone.embed(PROMPTS[:2]))
    alphas = backbone.scheduler.alphas_cumprod[table.timesteps].double()
    here, there = alphas[steps], torch.tensor([alphas[1], float(backbone.scheduler.final_alpha_cumprod)])
    for a_from, a_to, moved in (
        (here, there, table.forward(z, v, steps)),
        (there, here, table.back(z, v, steps)),
    ):
        for row in range(2):
            eps = here[row].sqrt() * v[row] + (1 - here[row]).sqrt() * z[row]
            expected = move(z[row : row + 1], eps[None], a_from[row], a_to[row])
            torch.testing.assert_close(moved[row : row + 1], expected.float())


def test_the_steps_are_those_of_the_checkpoints_own_schedule(load: Load) -> None:
    table = load("sd15").step_table(50)
    assert table.timesteps.tolist() == list(range(981, 0, -20))
    assert table.alphas[0] < 0.01 and 0.999 < table.alphas[-1] < 1
    assert table.alphas[-1] == float(load("sd15").scheduler.alphas_cumprod[0])
    spaced = load("anything_v3").step_table(50)
    assert spaced.timesteps[0] == 999 and spaced.timesteps[-1] == 0 and spaced.alphas[-1] == 1


def test_a_pndm_configuration_without_the_field_does_not_turn_clipping_on(copy: Path) -> None:
    path = copy / "scheduler" / "scheduler_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "clip_sample"}
    path.write_text(json.dumps(config | {"_class_name": "PNDMScheduler"}))
    assert Backbone.load(str(copy)).scheduler.config["clip_sample"] is False


def test_trailing_spacing_never_gives_a_timestep_below_zero(copy: Path) -> None:
    change_json(copy / "scheduler" / "scheduler_config.json", timestep_spacing="trailing")
    backbone = Backbone.load(str(copy))
    for steps in (10, 61, 103, 1000):
        table = backbone.step_table(steps)
        assert len(table) == steps and table.timesteps.min() >= 0


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_the_schedule_does_not_have_is_refused(steps: int, load: Load) -> None:
    with pytest.raises(UserError, match="1 to 1000, got"):
        load("tiny").step_table(steps)


def test_steps_that_an_offset_pushes_past_the_schedule_are_refused(load: Load) -> None:
    with pytest.raises(UserError, match="ask for fewer steps"):
        load("tiny").step_table(1000)


ZERO_SNR: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def test_epsilon_at_zero_terminal_snr_is_refused_and_taken_with_leading_spacing(copy: Path) -> None:
    config = copy / "scheduler" / "scheduler_config.json"
    change_json(config, **ZERO_SNR)
    with pytest.raises(UserError, match=r"zero terminal SNR.*give --model.timestep_spacing leading"):
        Backbone.load(str(copy)).step_table(50)
    leading = Backbone.load(str(copy), options=LoadOptions(timestep_spacing="leading"))
    assert leading.step_table(50).alphas[0] > 0


def test_v_at_zero_terminal_snr_begins_at_the_faintest_signal_and_steps_as_diffusers_does(copy: Path) -> None:
    change_json(copy / "scheduler" / "scheduler_config.json", **ZERO_SNR, prediction_type="v_prediction")
    backbone = Backbone.load(str(copy))
    table, scheduler = backbone.step_table(10), backbone.scheduler
    assert table.timesteps[0] == 999 and table.alphas[0] == 2.0**-24
    assert torch.equal(table.alphas[1:-1], scheduler.alphas_cumprod.double()[table.timesteps[1:]])
    z, v = normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1)
    for i, t in enumerate(table.timesteps[:-1]):
        theirs = scheduler.step(v, int(t), z, return_dict=False)[0]
        torch.testing.assert_close(table.forward(z, v, i), theirs, atol=1e-3, rtol=0)


def test_a_checkpoint_of_zero_terminal_snr_is_inverted_tuned_and_edited(copy: Path, tmp_path: Path) -> None:
    change_json(copy / "scheduler" / "scheduler_config.json", **ZERO_SNR, prediction_type="v_prediction")
    store = fits.fit(fits.picture(tmp_path / "cat.png"), tmp_path / "run", checkpoint=str(copy))
    assert store.read_run()["scheduler"]["alphas"][0] == 2.0**-24
    infos = [store.step_info(i) for i in range(3)]
    assert all(info["loss_end"] < info["loss_start"] for info in infos)
    assert fits.edit(store, checkpoint=str(copy))


def test_sizes_are_told_in_pixels(load: Load, copy: Path) -> None:
    sizes = {kind: load(kind).sample_size for kind in KINDS}
    # anything_v3 says 32 latents, as the first converters wrote for all, and was made for 64
    assert sizes == {"sd15": (512, 512), "sd21": (768, 768), "anything_v3": (512, 512), "tiny": (16, 16)}
    assert {kind: load(kind).multiple for kind in KINDS} == {
        "sd15": 64,
        "sd21": 64,
        "anything_v3": 64,
        "tiny": 4,
    }
    change_json(copy / "unet" / "config.json", sample_size=[8, 12])
    assert Backbone.load(str(copy)).sample_size == (16, 24)


def test_a_half_precision_unet_gives_fp32_epsilon_and_leaves_the_vae_in_fp32(home: Path, load: Load) -> None:
    half, full = Backbone.load(str(make("sd21", home)), torch.bfloat16), load("sd21")
    assert {p.dtype for m in (half.unet, half.text_encoder) for p in m.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    z, t = normal(2, 4, 8, 16), torch.tensor([981, 21])
    with torch.no_grad():
        eps = half.predict(z, t, half.embed(PROMPTS[:2]))
        expected = full.predict(z, t, full.embed(PROMPTS[:2]))
    assert eps.dtype == torch.float32
    torch.testing.assert_close(eps, expected, atol=0.1, rtol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(half.decode(z), full.decode(z))


def test_nothing_is_trainable_and_gradients_pass_through_epsilon(load: Load) -> None:
    backbone = load("tiny")
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(m.training for m in backbone.train().modules())
    z = normal(2, 4, 4, 6).requires_grad_()
    backbone.predict(z, torch.tensor([981, 21]), backbone.embed(PROMPTS[:2])).sum().backward()
    assert z.grad is not None and z.grad.abs().sum() > 0


def test_what_a_prompt_has_too_much_is_told(load: Load) -> None:
    backbone = load("tiny")
    assert backbone.prompts.truncated("a cat running") == "" and backbone.prompts.truncated("") == ""
    assert backbone.prompts.truncated("a cat " * 11 + "on the grass") == "on the grass"
    torch.testing.assert_close(
        backbone.embed(["a cat " * 11]), backbone.embed(["a cat " * 11 + "on the grass"])
    )


def test_a_tokenizer_that_does_not_know_its_limit_is_held_to_that_of_the_text_model(copy: Path) -> None:
    path = copy / "tokenizer" / "tokenizer_config.json"
    path.write_text(
        json.dumps({key: v for key, v in json.loads(path.read_text()).items() if "max" not in key})
    )
    assert Backbone.load(str(copy)).embed(["a cat"]).shape == (1, 24, 16)


def test_pictures_that_do_not_fit_the_vae_and_latents_that_ran_away_are_refused(
    load: Load,
) -> None:
    with pytest.raises(UserError, match="multiples of 8, got 64 x 70"):
        load("sd15").encode(normal(1, 3, 64, 70))
    with pytest.raises(UserError, match="not finite"):
        load("tiny").decode(torch.full((1, 4, 4, 4), torch.nan))


def test_the_identity_follows_the_contents_and_not_the_place(copy: Path, load: Load) -> None:
    there, here = load("tiny").identity, Backbone.load(str(copy)).identity
    assert here["checkpoint"] == str(copy) != there["checkpoint"]
    assert here["class"] == "StableDiffusionPipeline"
    assert here["sha256"] == there["sha256"] and len(here["sha256"]) == 64
    (copy / "README.md").write_text("of no consequence")
    (copy / "unet" / "diffusion_pytorch_model.bin").write_text("not what is loaded")
    assert Backbone.load(str(copy)).identity == here
    change_json(copy / "scheduler" / "scheduler_config.json", beta_end=0.013)
    after_schedule = Backbone.load(str(copy)).identity["sha256"]
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    after_weights = Backbone.load(str(copy)).identity["sha256"]
    assert len({here["sha256"], after_schedule, after_weights}) == 3


def test_a_file_that_is_only_hashed_and_cannot_be_read_is_named(copy: Path) -> None:
    (copy / "tokenizer" / "notes.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"notes\.txt cannot be read: .*; download or copy it again"):
        Backbone.load(str(copy))


def test_weights_are_found_as_bin_files_and_as_an_fp16_variant(copy: Path, load: Load) -> None:
    def rename(folder: str, old: str, new: str) -> None:
        (copy / folder / old).rename(copy / folder / new)

    rename("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
    text = copy / "text_encoder" / "model.safetensors"
    torch.save(load_file(text), copy / "text_encoder" / "pytorch_model.bin")
    text.unlink()
    ours, expected = Backbone.load(str(copy)), load("tiny")
    for name, parameter in expected.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name


def test_loading_says_nothing_and_leaves_the_loggers_as_they_were(
    copy: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    with caplog.at_level(logging.DEBUG):
        Backbone.load(str(copy)).embed(["a dog " * 60])
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith(("diffusers", "transformers"))]
    assert before == [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]


def test_a_safety_checker_is_never_looked_at(copy: Path) -> None:
    entry = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    change_json(copy / "model_index.json", safety_checker=entry, requires_safety_checker=True)
    Backbone.load(str(copy))


def refused(checkpoint: Path | str, *words: str) -> None:
    with pytest.raises(UserError) as error:
        Backbone.load(str(checkpoint))
    message = str(error.value)
    assert "\n" not in message and len(message.replace(str(checkpoint), "")) < 300, message
    for word in words:
        assert word in message, message


def test_a_place_without_a_checkpoint_is_refused(
    tmp_path: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    refused(tmp_path / "nowhere", "no folder", "nowhere")
    refused("nowhere", "no folder nowhere", "menagerie")
    refused("./nowhere/at_all", "no folder ./nowhere/at_all")
    refused("somebody/some-model", "no folder somebody/some-model", "hub")
    refused(copy / "model_index.json.txt", "no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no model_index.json", "Stable Diffusion 1 or 2")
    (tmp_path / "empty" / "pytorch_lora_weights.safetensors").touch()
    refused(tmp_path / "empty", "if pytorch_lora_weights.safetensors is the checkpoint, give that file")


def test_model_index_json_stands_for_its_folder(copy: Path) -> None:
    assert (
        Backbone.load(str(copy / "model_index.json")).identity["sha256"]
        == (Backbone.load(str(copy)).identity["sha256"])
    )


def of_the_hub(error: type[Exception], status: int) -> Exception:
    """What the hub's library raises, without the answer of the hub that it is made of."""
    return error.__new__(error, f"{status} Client Error. (Request ID: Root=1)\n\nNot Found for url: https://")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            LocalEntryNotFoundError("Please check your connection\nor not"),
            "hub: it cannot be reached, and its cache has no such files",
        ),
        (of_the_hub(RepositoryNotFoundError, 401), "hub: no public model has that name; check it"),
        (of_the_hub(GatedRepoError, 403), "hub: it is gated; ask for access on its page"),
        (of_the_hub(EntryNotFoundError, 404), "hub: the model of that name lacks files; kvinv needs"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line_that_says_why(
    error: Exception, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, heard = logging.getLogger("huggingface_hub"), list[logging.LogRecord]()

    def download(*args: str) -> str:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise error

    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", heard.append)
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr("kvinv_pl.models.checkpoints.hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    before = logger.level
    refused("nobody/nothing", "no folder nobody/nothing here, and not available from the", says)
    assert not heard and logger.level == before
    logger.warning("what others have to say")
    assert len(heard) == 1


def test_a_hub_id_is_read_from_the_cache_when_offline(
    home: Path, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit, repo = "0" * 40, tmp_path / "models--somebody--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(make("tiny", home), repo / "snapshots" / commit)
    identity = Backbone.load("somebody/tiny").identity
    assert identity == load("tiny").identity | {"checkpoint": "somebody/tiny"}
    (repo / "snapshots" / commit / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    refused("somebody/tiny", "FluxPipeline", "transformer")


def test_another_kind_of_model_is_refused_by_its_name(copy: Path, tmp_path: Path) -> None:
    refused(copy / "unet", "model_index.json", "only UNet2DConditionModel")
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    refused(bert, "model_index.json", "only BertModel")
    index = copy / "model_index.json"
    whole = json.loads(index.read_text())

    def other(name: str, without: tuple[str, ...] = (), **entries: Any) -> None:
        kept = {key: value for key, value in whole.items() if key not in without}
        index.write_text(json.dumps(kept | {"_class_name": name} | entries))

    index.write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    refused(copy, "PixArtAlphaPipeline", "transformer")
    other("StableDiffusion3Pipeline", ("unet",), transformer=["diffusers", "SD3Transformer2DModel"])
    refused(copy, "StableDiffusion3Pipeline", "transformer")
    other("StableDiffusionXLPipeline", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    refused(copy, "SDXL", "not supported")
    other("AltDiffusionPipeline", text_encoder=["alt_diffusion", "RobertaSeriesModelWithTransformation"])
    refused(copy, "AltDiffusionPipeline", "text_encoder", "Roberta")


def test_a_unet_that_wants_more_than_a_prompt_is_refused(copy: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(copy / "unet")
    for change, words in [
        ({"in_channels": 9}, ("takes 9 channels", "inpainting")),
        ({"time_cond_proj_dim": 8}, ("time_cond_proj_dim",)),
        ({"cross_attention_dim": 24}, ("width 24", "gives 16")),
    ]:
        shutil.rmtree(copy / "unet")
        UNet2DConditionModel(**{**unet.config, **change}).save_pretrained(copy / "unet")
        refused(copy, *words)


def test_a_unet_that_reads_pictures_or_boxes_is_told_what_it_is(copy: Path) -> None:
    for change, words in [
        ({"encoder_hid_dim_type": "ip_image_proj"}, ("has an IP-Adapter", "unload_ip_adapter()")),
        ({"attention_type": "gated"}, ("attention_type 'gated'", "GLIGEN")),
    ]:
        before = (copy / "unet" / "config.json").read_text()
        change_json(copy / "unet" / "config.json", **change)
        refused(copy, *words)
        with pytest.raises(UserError, match=re.escape(words[0])):
            load_on_meta(str(copy))
        (copy / "unet" / "config.json").write_text(before)


def test_a_lora_that_is_not_merged_is_told_and_a_merged_one_is_taken(copy: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(copy / "unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    unet.save_pretrained(copy / "unet")
    refused(copy, "unet", "a LoRA that is not merged", "fuse_lora()")
    unet.fuse_lora()
    unet.unload_lora()
    unet.save_pretrained(copy / "unet")
    Backbone.load(str(copy))


def test_weights_before_the_average_are_taken_where_there_are_no_others(copy: Path, load: Load) -> None:
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    ours, expected = Backbone.load(str(copy)).unet.state_dict(), load("tiny").unet.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_file_that_is_missing_cut_or_garbled_is_named(name: str, copy: Path) -> None:
    path = copy / name
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\0" * 100):
        path.write_bytes(damaged)
        refused(copy, name.split("/")[0])
    path.unlink()
    refused(copy, name.split("/")[0])
    shutil.rmtree(path.parent)
    refused(copy, name.split("/")[0])


def test_weights_that_lack_a_tensor_are_refused_and_not_made_up(copy: Path) -> None:
    for part, key in [("unet", "conv_in.weight"), ("text_encoder", "final_layer_norm.weight")]:
        path = next((copy / part).glob("*.safetensors"))
        tensors = load_file(path)
        save_file({name: t for name, t in tensors.items() if name != key}, path, metadata={"format": "pt"})
        refused(copy, part, "lacks", key)
        save_file(tensors, path, metadata={"format": "pt"})


def test_a_schedule_that_ddim_cannot_run_is_refused(copy: Path) -> None:
    path = copy / "scheduler" / "scheduler_config.json"
    change_json(path, prediction_type="sample")
    refused(copy, "'sample'", "epsilon or v_prediction")
    path.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}))
    refused(copy, "FlowMatchEulerDiscreteScheduler", "no betas")
    path.write_text(json.dumps({"_class_name": "DDIMScheduler", "beta_start": 0.1, "beta_schedule": "new"}))
    refused(copy, "beta_schedule 'new'", "squaredcos_cap_v2 or sigmoid")


def test_a_sigmoid_schedule_is_ddpms_own(copy: Path) -> None:
    path = copy / "scheduler" / "scheduler_config.json"
    change_json(path, beta_schedule="sigmoid")
    ours = Backbone.load(str(copy)).scheduler.alphas_cumprod
    theirs = cast(DDPMScheduler, DDPMScheduler.from_config(json.loads(path.read_text())))
    assert torch.equal(ours, theirs.alphas_cumprod)


def test_an_index_that_is_no_index_is_refused(copy: Path) -> None:
    for text in ("{", "[1]", ""):
        (copy / "model_index.json").write_text(text)
        refused(copy, "model_index.json", "cannot be read")
