"""CLIP scores and DINO's structure distance, on tiny random models, against plain computations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import fits
import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

from kvinv_pl import menagerie
from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import ACTIONS, Animal
from kvinv_pl.models.checkpoints.loading import quiet
from kvinv_pl.models.vision.clip import MEAN, STD, Clip
from kvinv_pl.models.vision.dino import Dino


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        config: Any = ViTConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
            image_size=224, patch_size=56,
        )  # fmt: skip
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def test_a_score_is_the_cosine_that_the_model_itself_gives(clip_folder: Path, tmp_path: Path) -> None:
    clip = Clip.load(clip_folder)
    picture = fits.opened(fits.picture(tmp_path / "p.png", (clip.size, clip.size)))
    x = (torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255).permute(1, 2, 0)
    x = ((x - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]
    model = clip.model
    tokens = clip.tokenizer("a cat running", return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=tokens["input_ids"], pixel_values=x)
    wanted = float(out.logits_per_image[0, 0] / model.logit_scale.exp())
    assert clip.score(picture, "a cat running") == pytest.approx(100 * max(0, wanted), abs=1e-3)
    assert float(clip.of_picture(picture) @ clip.of_text("a cat running")) == pytest.approx(wanted, abs=1e-5)


def test_a_picture_of_any_size_and_a_text_of_any_length_have_a_score(
    clip_folder: Path, tmp_path: Path
) -> None:
    clip = Clip.load(clip_folder)
    wide = fits.opened(fits.picture(tmp_path / "wide.png", (90, 20)))
    assert torch.isfinite(clip.of_picture(wide)).all()
    assert torch.isfinite(clip.of_text("a cat running " * 99)).all()


def test_a_folder_of_something_else_is_refused_in_one_line(
    clip_folder: Path, dino_folder: Path, tmp_path: Path
) -> None:
    for load, other in ((Clip.load, dino_folder), (Dino.load, clip_folder)):
        with pytest.raises(UserError, match="is of the kind"):
            load(other)
        with pytest.raises(UserError, match=r"has no config.json"):
            load(tmp_path)


def test_the_clip_of_the_menagerie_is_read_from_beside_its_checkpoint_or_its_absence_told(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(menagerie, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"the CLIP of the menagerie is missing: .*train_menagerie.py clip"):
        Clip.load("menagerie")
    (tmp_path / "weights" / "clip").symlink_to(clip_folder)
    given, named = Clip.load(clip_folder), Clip.load("menagerie")
    assert torch.equal(given.of_text("a cat"), named.of_text("a cat"))


def test_structure_is_the_self_similarity_of_the_last_keys(dino_folder: Path, tmp_path: Path) -> None:
    dino = Dino.load(dino_folder)
    a, b = (fits.opened(fits.picture(tmp_path / f"{n}.png", (224, 224), n)) for n in (1, 2))
    assert dino.distance(a, a) == 0 < dino.distance(a, b)
    keys = []
    for picture in (a, b):
        x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).double()  # 0 to 255, as published
        mean, std = (
            torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        layer: Any = dino.model.layers[-1]
        with torch.no_grad():
            hidden = dino.model(((x - mean) / std)[None].float(), output_hidden_states=True).hidden_states
            keys.append(layer.attention.k_proj(layer.layernorm_before(hidden[-2]))[0])
    maps = [torch.cosine_similarity(k[:, None], k[None], dim=2) for k in keys]
    assert dino.distance(a, b, 255.0) == pytest.approx(float((maps[0] - maps[1]).square().mean()), rel=1e-3)
    tall = fits.opened(fits.picture(tmp_path / "tall.png", (20, 60)))
    assert dino.self_similarity(tall).shape[0] == 1 + (480 // 56) * (160 // 56)


def test_the_shipped_clip_knows_what_an_animal_does_and_the_source_from_its_edit() -> None:
    clip = Clip.load("menagerie")
    for animal in map(Animal.sample, range(1_000_000, 1_000_008)):
        target = next(action for action in ACTIONS if action != animal.action)
        for action, other in ((animal.action, target), (target, animal.action)):
            seen = clip.of_picture(animal.render(action))
            assert (
                float(seen @ (clip.of_text(animal.prompt(action)) - clip.of_text(animal.prompt(other))))
                > 0.05
            )
