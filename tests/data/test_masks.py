"""Masks: from every kind of file, and from the model's own attention to a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from PIL import Image

from kvinv_pl.data.images.geometry import Geometry, as_pixels, fit_geometry
from kvinv_pl.data.images.masks import fit_mask, open_mask, tint_subject
from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import Animal
from kvinv_pl.models.prompts import mask_from_word, word_positions
from kvinv_pl.models.stable_diffusion import Backbone

SIZE = (20, 12)  # width and height
WHOLE = Geometry(SIZE, SIZE)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(str(checkpoints.make("tiny", tmp_path_factory.mktemp("models"))))


def subject() -> np.ndarray:
    """Where the subject is, (h, w)."""
    inside = np.zeros(SIZE[::-1], dtype=bool)
    inside[3:9, 4:15] = True
    return inside


def grey(inside: np.ndarray) -> Image.Image:
    return Image.fromarray(inside.astype(np.uint8) * 255)


def cut_out(inside: np.ndarray) -> Image.Image:
    """A photograph whose background is transparent."""
    photo = Image.effect_noise(SIZE, 80).convert("RGB")
    photo.putalpha(grey(inside))
    return photo


def palette_with_a_transparent_entry(inside: np.ndarray) -> Image.Image:
    image = Image.fromarray(inside.astype(np.uint8), "P")
    image.putpalette([200, 200, 200, 10, 10, 10])
    image.info["transparency"] = 0
    return image


def labels(inside: np.ndarray, label: int) -> Image.Image:
    return Image.fromarray(inside.astype(np.uint8) * np.uint8(label))


def palette_of_labels(inside: np.ndarray) -> Image.Image:
    """As annotation tools write it: label 1 is dark red."""
    image = Image.fromarray(inside.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    return image


def two_colours(inside: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(inside[..., None], [0, 0, 255], [40, 0, 0]).astype(np.uint8))


# ------------------------------------------------------------------------------------------------ from a file


@pytest.mark.parametrize(
    ("make", "suffix"),
    [
        (grey, "png"),
        (lambda inside: grey(inside).convert("1"), "png"),
        (lambda inside: grey(inside).convert("RGB"), "png"),
        (lambda inside: grey(inside).convert("P"), "png"),
        (lambda inside: grey(inside).convert("RGBA"), "png"),  # opaque everywhere: the brightness tells
        (cut_out, "png"),
        (lambda inside: cut_out(inside).convert("LA"), "png"),
        (palette_with_a_transparent_entry, "png"),
        (lambda inside: Image.fromarray(inside.astype(np.uint8)), "png"),
        (lambda inside: Image.fromarray(inside.astype(np.uint16)), "png"),
        (lambda inside: Image.fromarray(inside.astype(np.uint16) * 65535), "png"),
        (lambda inside: Image.fromarray(inside.astype(np.float32)), "tif"),
        (lambda inside: Image.fromarray(inside.astype(np.int32)), "tif"),
        (lambda inside: labels(inside, 3), "png"),
        (lambda inside: Image.fromarray(inside.astype(np.uint16) * 1000), "png"),
        (palette_of_labels, "png"),
        (two_colours, "png"),
    ],
    ids=[
        *("grey", "1 bit", "RGB", "palette", "RGBA", "alpha", "LA", "transparent palette", "0 and 1"),
        *("0 and 1 in 16 bit", "16 bit", "float", "integers", "label 3", "label 1000", "palette of labels"),
        "two colours",
    ],
)
def test_every_kind_of_file_gives_the_same_mask(
    tmp_path: Path, make: Callable[[np.ndarray], Image.Image], suffix: str
) -> None:
    make(subject()).save(tmp_path / f"mask.{suffix}")
    mask = open_mask(tmp_path / f"mask.{suffix}").image
    assert mask.mode == "L"
    np.testing.assert_array_equal(np.array(mask), subject() * np.uint8(255))


@pytest.mark.parametrize("kind", ["grey", "alpha", "float"])
def test_what_lies_between_black_and_white_is_kept(tmp_path: Path, kind: str) -> None:
    ramp = np.tile(np.linspace(0, 255, SIZE[0]).round().astype(np.uint8), (SIZE[1], 1))
    image = Image.fromarray(ramp) if kind != "float" else Image.fromarray(ramp.astype(np.float32) / 255)
    if kind == "alpha":
        image = Image.merge("LA", (Image.new("L", SIZE, 90), image))
    image.save(tmp_path / "mask.tif")
    np.testing.assert_array_equal(np.array(open_mask(tmp_path / "mask.tif").image), ramp)


def test_a_file_that_is_no_mask_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full(SIZE[::-1], -1.0, np.float32)).save(tmp_path / "mask.tif")
    with pytest.raises(UserError, match=r"mask\.tif cannot be read .*neither 0 to 1 nor of 8 or 16 bit"):
        open_mask(tmp_path / "mask.tif")
    with pytest.raises(UserError, match=r"nope\.png, found nothing"):
        open_mask(tmp_path / "nope.png")


@pytest.mark.parametrize("make", [grey, cut_out, palette_of_labels, lambda inside: labels(inside, 3)])
def test_a_mask_may_be_taken_the_other_way_round(
    tmp_path: Path, make: Callable[[np.ndarray], Image.Image]
) -> None:
    make(~subject()).save(tmp_path / "mask.png")
    mask = open_mask(tmp_path / "mask.png", invert=True)
    np.testing.assert_array_equal(np.array(mask.image), subject() * np.uint8(255))
    assert mask.sha256 != open_mask(tmp_path / "mask.png").sha256


def test_of_several_labels_the_brightest_is_said(tmp_path: Path) -> None:
    values = np.zeros(SIZE[::-1], dtype=np.uint8)
    values[:4], values[4:8] = 1, 3
    Image.fromarray(values).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="got only values up to 3 of 255"):
        fit_mask(open_mask(tmp_path / "mask.png").image, WHOLE, "it")


def test_a_mask_is_upright_like_its_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turn it right
    grey(subject()).save(tmp_path / "mask.png", exif=exif)
    turned = np.array(open_mask(tmp_path / "mask.png").image)
    np.testing.assert_array_equal(turned, np.rot90(subject(), -1) * np.uint8(255))


def test_a_mask_lies_over_the_pixels_of_the_model() -> None:
    geometry = fit_geometry(SIZE, (24, 24), 8, "keep")
    mask = fit_mask(grey(subject()), geometry, "it")
    assert mask.shape == (24, 40) and mask.min() == 0 and mask.max() == 1
    assert abs(float(mask.mean()) - subject().mean()) < 0.02


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (Image.new("L", (12, 20), 255), "it is 12x20, its picture is 20x12 pixels"),
        (
            Image.new("L", SIZE, 0),
            "it is empty: expected white on the subject, got black everywhere: paint it again",
        ),
        (Image.new("L", SIZE, 120), "it is empty: expected white .*, got only values up to 120 of 255"),
        (Image.new("L", SIZE, 140), "it is full: expected black .*, got only values from 140 of 255 up"),
        (
            Image.new("L", SIZE, 255),
            "it is full: expected black around the subject, got white everywhere: paint it again",
        ),
    ],
)
def test_a_mask_of_another_size_an_empty_and_a_full_one_are_refused(mask: Image.Image, says: str) -> None:
    with pytest.raises(UserError, match=says):
        fit_mask(mask, WHOLE, "it")


def test_a_subject_outside_the_crop_is_refused() -> None:
    mask = Image.new("L", SIZE)
    mask.paste(255, (0, 0, 3, 12))
    geometry = fit_geometry(SIZE, (12, 12), 4, "crop")
    with pytest.raises(UserError, match=r"it is empty: .* in the part of the picture that is used"):
        fit_mask(mask, geometry, "it")
    assert fit_mask(mask, WHOLE, "it").any()


def test_a_mask_is_shown_by_a_tint_on_the_subject_alone() -> None:
    picture = Image.effect_noise(SIZE, 80).convert("RGB")
    before, after = np.array(picture), np.array(tint_subject(picture, grey(subject())))
    np.testing.assert_array_equal(after[~subject()], before[~subject()])
    assert (after[subject()] != before[subject()]).any(-1).all()


# ------------------------------------------------------------------------------------------------ from a word


@pytest.mark.parametrize(
    ("prompt", "word", "expected"),
    [
        ("a cat standing", "cat", [2]),
        ("a cat standing", "Standing", [3]),
        ("a cat standing on the grass", "the grass", [5, 6]),
        ("a red cat, a red dog", "red", [2, 6]),
        ("a fox", "fox", [2, 3, 4]),  # spelled, since the vocabulary lacks it
        ("a ffox, a fox", "fox", [8, 9, 10]),  # and not the end of a longer word
    ],
)
def test_a_word_stands_at_its_tokens(backbone: Backbone, prompt: str, word: str, expected: list[int]) -> None:
    assert word_positions(backbone, prompt, word) == expected
    ids = backbone.tokenizer(prompt)["input_ids"]
    said = backbone.tokenizer.decode([ids[at] for at in expected])
    assert word.lower() in said


@pytest.mark.parametrize("token", ["<sks>", "sks"])
def test_a_word_stands_after_a_token_that_was_added(tmp_path: Path, token: str) -> None:
    own = Backbone.load(str(checkpoints.make("tiny", tmp_path)))
    own.tokenizer.add_tokens([token])
    assert word_positions(own, f"a {token} dog running", "dog") == [3]
    assert word_positions(own, f"a {token} dog running", token) == [2]
    assert word_positions(own, f"a {token} dog running", f"{token} dog") == [2, 3]


@pytest.mark.parametrize(
    ("prompt", "word", "says"),
    [
        (
            "a cat standing",
            "dog",
            "'dog' is not in the prompt 'a cat standing': expected one of a, cat, standing",
        ),
        ("a cat standing", "at", "'at' is not in the prompt"),
        ("a cat standing", " ", "' ' is not in the prompt"),
        ("", "cat", "'cat' is not in the prompt '': expected one of no words"),
        ("a " * 30 + "cat", "cat", "'cat' comes after the end of what the model reads of the prompt"),
    ],
)
def test_a_word_that_the_model_does_not_read_is_refused(
    backbone: Backbone, prompt: str, word: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        word_positions(backbone, prompt, word)


def test_a_mask_from_a_word_is_always_the_same_and_leaves_the_model_as_it_was(backbone: Backbone) -> None:
    pixels = torch.rand(3, 24, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    state = torch.random.get_rng_state()
    mask = mask_from_word(backbone, pixels, "a cat standing", "cat")
    assert mask.shape == (24, 16) and set(mask.unique().tolist()) == {0, 1}
    assert torch.equal(mask, mask_from_word(backbone, pixels, "a cat standing", "cat"))
    assert not torch.equal(mask, mask_from_word(backbone, pixels, "a cat standing", "standing"))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(module._forward_pre_hooks for module in backbone.unet.modules())


def test_a_mask_from_the_word_of_an_animal_lies_on_the_animal() -> None:
    embedded, overlaps, shares = Backbone.load("menagerie"), list[float](), list[float]()
    for animal in (Animal.sample(900_100 + number) for number in range(8)):
        pixels, true = as_pixels(animal.render()), torch.from_numpy(np.array(animal.mask()))
        found = mask_from_word(embedded, pixels, animal.prompt(), animal.species) > 0.5
        overlaps.append(float((found & true).sum() / (found | true).sum()))
        shares.append(float(true.float().mean()))  # the IoU of marking everything
    assert np.mean(overlaps) > 0.4 > 0.25 > np.mean(shares)
