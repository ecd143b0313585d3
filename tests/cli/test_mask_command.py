"""`kvinv mask`: what it writes, and what it says of a mistake."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import segmenters
from commands import kvinv, photograph, refused, size, tree
from PIL import Image

from kvinv_pl.data.images.masks import open_mask
from kvinv_pl.models.vision.sam import Segmenter

SIZE = (48, 32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a SAM, sam, and a Stable Diffusion checkpoint, tiny."""
    folder = tmp_path_factory.mktemp("models")
    segmenters.make(folder / "sam")
    checkpoints.make("tiny", folder)
    return folder


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    return photograph(tmp_path / "cat.png", SIZE)


def test_the_mask_and_the_picture_under_it_are_written_and_named(
    models: Path, cat: Path, tmp_path: Path
) -> None:
    answer = kvinv("mask", cat, "--point", "31,20", "--sam", models / "sam", "-o", tmp_path / "new" / "m.png")
    mask, shown = tmp_path / "new" / "m.png", tmp_path / "new" / "m-shown.png"
    assert answer.code == 0 and answer.out == f"{mask}\n{shown}\n" and not answer.err
    assert tree(tmp_path) == {"cat.png", "new/m.png", "new/m-shown.png"}
    assert size(mask) == SIZE and size(shown) > SIZE
    with Image.open(mask) as opened, Image.open(cat) as picture:
        assert opened.mode == "L" and set(opened.tobytes()) == {0, 255}
        segmenter = Segmenter.load(str(models / "sam"))
        assert opened.tobytes() == segmenter.segment(picture, points=[(31, 20)]).tobytes()


def test_points_may_be_many_and_come_with_a_box(models: Path, cat: Path, tmp_path: Path) -> None:
    segmenter, out = Segmenter.load(str(models / "sam")), tmp_path / "m.png"
    points, box = [(31.0, 20.0), (3.5, 4.0)], (1.0, 2.0, 40.0, 30.0)
    typed = ["--point", "31,20", "--point=3.5,4"]
    with Image.open(cat) as picture:
        for options, expected in (
            (typed, segmenter.segment(picture, points=points)),
            (["--box", "1,2,40,30"], segmenter.segment(picture, box=box)),
            ([*typed, "--box=1,2,40,30"], segmenter.segment(picture, points=points, box=box)),
            ([], segmenter.segment(picture)),
        ):
            answer = kvinv("mask", *options, "--sam", models / "sam", "--out", out, "--image", cat)
            assert answer.code == 0, answer.err
            assert open_mask(out).image.tobytes() == expected.tobytes()


def test_a_word_needs_no_sam(models: Path, cat: Path, tmp_path: Path) -> None:
    options = ["--source", "a cat standing", "--checkpoint", models / "tiny", "-o", tmp_path / "m.png"]
    answer = kvinv("mask", cat, "--word", "cat", *options)
    assert answer.code == 0, answer.err
    assert size(tmp_path / "m.png") == SIZE
    assert set(np.array(open_mask(tmp_path / "m.png").image).flat) == {0, 255}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--point", "48,5"],
            "the point 48,5 is outside the picture: expected x from 0 to 47, y from 0 to 31",
        ),
        (["--point", "31"], "--point: expected X,Y in pixels, got '31'"),
        (["--point", "1,2,3"], "--point: expected X,Y in pixels, got '1,2,3'"),
        (["--point", "left"], "--point: expected X,Y in pixels, got 'left'"),
        (["--point"], "--point expects a value, got --sam"),
        (["--box", "1,2,3"], "--box: expected X0,Y0,X1,Y1 in pixels, got '1,2,3'"),
        (["--box", "9,2,3,8"], "the box 9,2,3,8 is none in the picture"),
        (["--sam", "nope"], "there is no folder nope"),
        (["--sam", "MODELS/tiny"], "tiny is a diffusion model, expected SAM"),
        (["--sam", "MODELS/tiny/unet"], "unet contains no config.json of a model, expected SAM"),
        (["--sam", "MODELS/tiny/text_encoder"], "contains a model of type 'clip_text_model', expected SAM"),
        (["--word", "cat"], "--word needs --source"),
        (
            ["--word", "cat", "--source", "a cat", "--point", "3,3"],
            "--point is for SAM and cannot be combined with --word",
        ),
        (["--source", "a cat"], "--source, --checkpoint and --model only work with --word: add --word"),
        (
            ["--word", "dog", "--source", "a cat", "--checkpoint", "MODELS/tiny"],
            "'dog' is not in the prompt 'a cat'",
        ),
        (["-o", "mask.jpg"], "out: expected the name of a .png file, got mask.jpg"),
        (["other.png"], "unexpected 'other.png'"),
        (["--pont", "3,3"], "no option --pont: did you mean --point"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    models: Path, cat: Path, tmp_path: Path, options: list[str], says: str
) -> None:
    given = [option.replace("MODELS", str(models)) for option in options]
    sam = [] if "--sam" in options or "--word" in options else ["--sam", models / "sam"]
    out = [] if "-o" in options else ["-o", tmp_path / "m.png"]
    refused(kvinv("mask", cat, *given, *sam, *out), says)
    assert tree(tmp_path) == {"cat.png"}


def test_the_picture_is_asked_for_and_never_written_over(models: Path, cat: Path, tmp_path: Path) -> None:
    before = cat.read_bytes()
    refused(kvinv("mask", "-o", tmp_path / "m.png"), "image")
    refused(kvinv("mask", tmp_path / "nope.png", "--sam", models / "sam"), "nope.png, found nothing")
    refused(kvinv("mask", cat, "--sam", models / "sam", "-o", cat), "is the picture itself")
    refused(kvinv("mask", cat, "--sam", models / "sam", "-o", cat / "m.png"), "cannot write")
    assert cat.read_bytes() == before and tree(tmp_path) == {"cat.png"}


def test_where_nothing_is_found_another_prompt_is_asked_for(models: Path, cat: Path, tmp_path: Path) -> None:
    blind = Path(shutil.copytree(models / "sam", tmp_path / "blind"))
    model: Any = Segmenter.load(str(blind)).model
    for layer in model.mask_decoder.output_hypernetworks_mlps:
        layer.proj_out.weight.zero_()
        layer.proj_out.bias.zero_()
    model.save_pretrained(blind)
    refused(
        kvinv("mask", cat, "--sam", blind, "-o", tmp_path / "m.png"), "no subject was found: give another"
    )
    assert not (tmp_path / "m.png").exists()


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (Image.new("L", (32, 48), 255), "mask.png is 32x48, its picture is 48x32 pixels"),
        (Image.new("L", SIZE, 0), "mask.png is empty: expected white on the subject"),
        (Image.new("1", SIZE, 1), "mask.png is full: expected black around the subject"),
    ],
)
def test_a_run_refuses_a_mask_of_another_size_an_empty_and_a_full_one(
    models: Path, cat: Path, tmp_path: Path, mask: Image.Image, says: str
) -> None:
    mask.save(tmp_path / "mask.png")
    options = ["--source", "a cat", "--checkpoint", models / "tiny", "--steps", 2, "--out", tmp_path / "out"]
    refused(kvinv("invert", "--image", cat, "--mask", tmp_path / "mask.png", *options), says)
    assert not (tmp_path / "out").exists()
