"""InstructPix2Pix by a tiny checkpoint of its kind, against Eq. 3 of its paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import fits
import pytest
import torch
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from torch import Tensor

import kvinv_pl
from kvinv_pl.bench.methods import make
from kvinv_pl.bench.rows import Row
from kvinv_pl.bench.running import run_method
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.loading import quiet
from kvinv_pl.models.published.instruct_pix2pix import InstructPix2PixModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.instructed(tmp_path_factory.mktemp("instructed") / "pix2pix")


@torch.no_grad()
def test_it_samples_by_equation_3(folder: Path) -> None:
    loaded = InstructPix2PixModel.load(str(folder), torch.device("cpu"))
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = loaded.edit(pixels, "make it a dog", 3, 4.0, 1.5, 7)

    pipeline, draw = loaded.pipeline, torch.Generator().manual_seed(7)
    with quiet():  # of what it does with numpy
        scheduler: Any = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(3)

    def read(text: str) -> Tensor:
        most = pipeline.tokenizer.model_max_length
        ids = pipeline.tokenizer(text, padding="max_length", max_length=most, return_tensors="pt").input_ids
        return pipeline.text_encoder(ids)[0]

    seen = pipeline.vae.encode(pixels).latent_dist.mode()
    nothing, told, untold = torch.zeros_like(seen), read("make it a dog"), read("")
    z = torch.randn(seen.shape, generator=draw) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:

        def e(image: Tensor, text: Tensor, z: Tensor = z, t: Tensor = t) -> Tensor:
            x = torch.cat([scheduler.scale_model_input(z, t), image], 1)
            return pipeline.unet(x, t, encoder_hidden_states=text).sample

        of_picture = e(seen, untold) - e(nothing, untold)
        out = e(nothing, untold) + 1.5 * of_picture + 4.0 * (e(seen, told) - e(seen, untold))
        with quiet():
            z = scheduler.step(out, t, z, generator=draw).prev_sample
    wanted = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    assert torch.allclose(found, wanted, atol=1e-4)


def test_a_picture_is_edited_by_what_it_is_told_in_its_own_size(folder: Path, tmp_path: Path) -> None:
    model = kvinv_pl.load(str(fits.checkpoint()), accelerator="cpu", **fits.QUICK)
    picture = fits.opened(fits.picture(tmp_path / "cat.png", (20, 16)))
    options: dict[str, Any] = {"checkpoint": str(folder), "steps": 1}

    def told(target: str, **more: Any) -> Any:
        method = make("instruct_pix2pix", "whole", **options, **more)
        return run_method(model, picture, "a cat", target, editor=method)

    dog, horse = told("a dog"), told("a horse")
    assert dog.size == (20, 16) and fits.levels(dog, horse) > 0
    assert fits.levels(dog, told("a dog")) == 0
    assert fits.levels(horse, told("a dog", instruction="make it a horse")) == 0


def test_its_row_is_typed_with_its_folder_and_has_the_published_defaults(folder: Path) -> None:
    row = Row.parse(f"instruct_pix2pix(checkpoint={str(folder)!r}, image_guidance=2.0)@16")
    _, method = row.make_methods()
    shown: Any = method
    assert (shown.checkpoint, shown.image_guidance, row.cases) == (str(folder), 2.0, 16)
    published = make("instruct_pix2pix", "whole")
    assert (published.steps, published.guidance, published.image_guidance) == (100, 7.5, 1.5)


def test_what_cannot_be_told_or_loaded_is_refused_in_one_line(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(
        UserError, match="has a U-Net of 4 input channels, not 8; expected an InstructPix2Pix"
    ):
        InstructPix2PixModel.load(str(fits.checkpoint()), cpu)
    with pytest.raises(UserError, match="there is no folder"):
        InstructPix2PixModel.load(str(tmp_path / "none"), cpu)
    with pytest.raises(UserError, match="the embedded world has no InstructPix2Pix"):
        InstructPix2PixModel.load("menagerie", cpu)
    with pytest.raises(UserError, match=r"steps, image_guidance: expected 1 or more, got 0 and 1\.5"):
        make("instruct_pix2pix", "whole", steps=0)
    with pytest.raises(UserError, match=r"instruction: expected text with \{source\} and \{target\} alone"):
        make("instruct_pix2pix", "whole", instruction="make it {something}")
