"""Repositories of the hub: which of their files are fetched, and a VAE by its hub id."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from checkpoints import cached, make
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from single_files import folder, vae_tensors
from torch import Tensor

import kvinv_pl
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.loading import quiet
from kvinv_pl.models.checkpoints.weight_files import variants_in, weight_files
from kvinv_pl.models.load_options import LoadOptions
from kvinv_pl.models.stable_diffusion import Backbone

UNET = "diffusion_pytorch_model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("tiny", tmp_path_factory.mktemp("checkpoints"))


def halved(weights: Path) -> None:
    """The same in half precision, as the variant of it beside it."""
    half = {name: value.half() for name, value in load_file(weights).items()}
    save_file(half, weights.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})


def same(part: torch.nn.Module, tensors: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, tensors[name].float()) for name, value in part.state_dict().items())


@pytest.mark.parametrize(
    ("names", "variant", "expected"),
    [
        ([f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"], None, ("", [f"{UNET}.safetensors"])),
        ([f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"], "fp16", ("fp16", [f"{UNET}.fp16.safetensors"])),
        ([f"{UNET}.fp16.safetensors", f"{UNET}.fp16.bin"], None, ("fp16", [f"{UNET}.fp16.safetensors"])),
        ([f"{UNET}.fp16.safetensors", f"{UNET}.bin"], None, ("", [f"{UNET}.bin"])),
        ([f"{UNET}.non_ema.bin"], None, ("non_ema", [f"{UNET}.non_ema.bin"])),
        ([f"{UNET}.safetensors"], "fp16", ("", [f"{UNET}.safetensors"])),
        (
            [f"{UNET}-0000{n}-of-00002.safetensors" for n in (1, 2)],
            None,
            ("", [f"{UNET}-0000{n}-of-00002.safetensors" for n in (1, 2)]),
        ),
    ],
)
def test_the_full_weights_are_taken_or_those_that_there_are_or_are_asked_for(
    names: list[str], variant: str | None, expected: tuple[str, list[str]]
) -> None:
    found = weight_files([*names, "config.json"], "unet", variant)
    assert found is not None and (found.variant, found.names) == expected
    assert weight_files(["config.json"], "unet") is None
    assert "fp16" in variants_in(["model.fp16.safetensors"], "text_encoder")


def test_half_precision_is_taken_where_it_is_asked_for_or_all_that_there_is(
    checkpoint: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(checkpoint, tmp_path / "both")
    unet, text = place / "unet" / f"{UNET}.safetensors", place / "text_encoder" / "model.safetensors"
    for weights in (unet, text):
        halved(weights)
    asked: Any = LoadOptions(variant="fp16")
    full, half = Backbone.load(str(place)), Backbone.load(str(place), torch.float32, asked)
    assert same(full.unet, load_file(unet)) and not same(half.unet, load_file(unet))
    assert same(half.unet, load_file(unet.with_suffix(".fp16.safetensors")))
    assert same(half.text_encoder, load_file(text.with_suffix(".fp16.safetensors")))
    assert torch.equal(next(half.vae.parameters()), next(full.vae.parameters()))  # which has no other
    assert half.identity["variant"] == "fp16" and half.identity["sha256"] != full.identity["sha256"]
    words = "has no weights of 'bf16', it has full ones and fp16"
    with pytest.raises(UserError, match=f"--model.variant: {re.escape(str(place))} {words}"):
        Backbone.load(str(place), torch.float32, LoadOptions(variant="bf16"))
    unet.unlink()
    alone = Backbone.load(str(place))
    assert same(alone.unet, load_file(unet.with_suffix(".fp16.safetensors")))


def test_of_a_repository_with_half_precision_alone_that_is_fetched(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str | None]()

    def download(name: str, *, variant: str | None, **unused: None) -> str:
        asked.append(variant)
        return str(checkpoint)

    pipelines = "diffusers.pipelines.pipeline_utils.DiffusionPipeline.download"
    monkeypatch.setattr(pipelines, download)  # of the hub: there is no network here
    monkeypatch.setattr(
        "kvinv_pl.models.checkpoints.hub.hf_hub_download", lambda *_: checkpoint / "model_index.json"
    )
    for names in ([f"unet/{UNET}.fp16.safetensors"], [f"unet/{UNET}.fp16.bin", f"unet/{UNET}.bin"]):
        monkeypatch.setattr("kvinv_pl.models.checkpoints.hub.list_repo_files", lambda _, names=names: names)
        Backbone.load("somebody/half")
    with pytest.raises(UserError, match=r"--model.variant: somebody/half has no weights of 'non_ema'"):
        Backbone.load("somebody/half", torch.float32, LoadOptions(variant="non_ema"))
    assert asked == ["fp16", None]


def test_a_vae_is_had_by_its_hub_id(checkpoint: Path, hub: Path, tmp_path: Path) -> None:
    other = load_file(checkpoint / "vae" / f"{UNET}.safetensors")
    other = {name: value * 1.1 for name, value in other.items()}

    def expected(vae: str) -> str:
        backbone = Backbone.load(str(checkpoint), torch.float32, LoadOptions(vae=vae))
        assert same(backbone.vae, other) and backbone.identity["vae"] == vae
        return backbone.identity["sha256"]

    alone = cached("somebody/vae", hub)
    shutil.copy(checkpoint / "vae" / "config.json", alone)
    save_file(other, alone / f"{UNET}.safetensors", metadata={"format": "pt"})
    (alone / "README.md").write_text("of no consequence")
    whole = cached("somebody/pipeline", hub)
    shutil.copytree(alone, whole / "vae")
    (whole / "model_index.json").write_text("{}")
    assert expected("somebody/vae") == expected("somebody/pipeline") == expected(str(alone))
    for name, words in [
        ("somebody/nothing", "no VAE somebody/nothing here, and not available from the hub"),
        ("somebody/vae/else.safetensors", "no file somebody/vae/else.safetensors here"),
    ]:
        with pytest.raises(UserError, match=words):
            Backbone.load(str(checkpoint), torch.float32, LoadOptions(vae=name))


def test_a_vae_in_the_original_layout_is_had_from_the_hub(
    checkpoint: Path, hub: Path, tmp_path: Path
) -> None:
    with quiet():
        vae = AutoencoderKL.from_pretrained(folder("sd1", tmp_path / "sd1") / "vae")
    place = cached("somebody/original", hub)
    save_file(
        {name: value.contiguous() for name, value in vae_tensors(vae).items()},
        place / "vae-840000.safetensors",
    )
    for name in ("somebody/original", "somebody/original/vae-840000.safetensors"):
        backbone = Backbone.load(str(checkpoint), torch.float32, LoadOptions(vae=name))
        assert same(backbone.vae, vae.state_dict())


def test_from_python_a_checkpoint_that_does_not_exist_is_refused_when_it_is_loaded(
    checkpoint: Path, hub: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, cached("somebody/tiny", hub), dirs_exist_ok=True)
    assert kvinv_pl.load("somebody/tiny").model.checkpoint == "somebody/tiny"
    for name, says in {
        "somebody/nothing": "no folder somebody/nothing here, and not available from the hub: it cannot be",
        str(tmp_path / "nowhere"): "there is no folder",
    }.items():
        with pytest.raises(UserError, match=re.escape(says)) as caught:
            kvinv_pl.load(name)
        assert "\n" not in str(caught.value)
