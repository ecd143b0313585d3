"""Masks from SAM: the same as transformers gives, in the picture's size, and the object that is meant."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmenters
import torch
from commands import photograph
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SamModel, SamProcessor

from kvinv_pl import menagerie
from kvinv_pl.errors import UserError
from kvinv_pl.models.vision.sam import GRID, Segmenter, prominence

WIDE = (60, 40)  # pixels of the picture
POINT, BOX = (31.0, 12.0), (8.0, 5.0, 50.0, 30.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segmenters.make(tmp_path_factory.mktemp("models") / "sam")


@pytest.fixture(scope="module")
def segmenter(folder: Path) -> Segmenter:
    return Segmenter.load(str(folder))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Image.Image:
    with Image.open(photograph(tmp_path_factory.mktemp("pictures") / "wide.png", WIDE)) as opened:
        return opened.copy()


def values(mask: Image.Image) -> np.ndarray:
    return np.array(mask) > 127


def as_transformers_does(folder: Path, picture: Image.Image, three: bool, **prompts: Any) -> np.ndarray:
    """The steps of transformers' documentation, and the answer that the model is surest of."""
    model, processor = SamModel.from_pretrained(folder), SamProcessor.from_pretrained(folder)
    inputs: Any = processor(picture, return_tensors="pt", **prompts)
    with torch.no_grad():
        out = model(**inputs, multimask_output=three)
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    found = processor.post_process_masks(out.pred_masks, *sizes)
    return found[0][0, int(out.iou_scores[0, 0].argmax())].numpy()


@pytest.mark.parametrize(
    ("asked", "three", "prompts"),
    [
        ({"points": [POINT]}, True, {"input_points": [[list(POINT)]]}),
        ({"points": [POINT, (3, 30)]}, False, {"input_points": [[list(POINT), [3, 30]]]}),
        ({"box": BOX}, False, {"input_boxes": [[list(BOX)]]}),
        (
            {"points": [POINT], "box": BOX},
            False,
            {"input_points": [[list(POINT)]], "input_boxes": [[list(BOX)]]},
        ),
    ],
    ids=["a point", "points", "a box", "both"],
)
def test_a_mask_is_what_transformers_gives_in_the_size_of_the_picture(
    folder: Path, segmenter: Segmenter, picture: Image.Image, asked: Any, three: bool, prompts: Any
) -> None:
    mask = segmenter.segment(picture, **asked)
    assert mask.size == WIDE and mask.mode == "L" and set(mask.tobytes()) == {0, 255}
    np.testing.assert_array_equal(values(mask), as_transformers_does(folder, picture, three, **prompts))


def test_a_prompt_decides_what_is_found(segmenter: Segmenter, picture: Image.Image) -> None:
    answers = [segmenter.segment(picture, points=[point]).tobytes() for point in (POINT, (3, 30), (50, 35))]
    assert len({*answers, segmenter.segment(picture, box=BOX).tobytes()}) == 4


def test_without_a_prompt_it_is_the_most_prominent_answer_to_a_grid_of_points(
    folder: Path, segmenter: Segmenter, picture: Image.Image
) -> None:
    model, processor = SamModel.from_pretrained(folder), SamProcessor.from_pretrained(folder)
    grid: Any = [
        [(i + 0.5) * WIDE[0] / GRID, (j + 0.5) * WIDE[1] / GRID] for j in range(GRID) for i in range(GRID)
    ]
    inputs: Any = processor(picture, input_points=[[[point] for point in grid]], return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    tall = round(segmenters.SIZE * WIDE[1] / WIDE[0])  # what the picture takes up of the square
    scores = out.iou_scores.flatten() * prominence(out.pred_masks.flatten(0, 2)[:, :tall] > 0)
    best = out.pred_masks.flatten(0, 2)[scores.argmax()][None, None, None]
    expected = processor.post_process_masks(best, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    np.testing.assert_array_equal(values(segmenter.segment(picture)), expected[0][0, 0].numpy())


def test_any_mode_of_picture_is_taken(segmenter: Segmenter, picture: Image.Image) -> None:
    grey = segmenter.segment(picture.convert("L"), points=[POINT])
    assert grey.tobytes() == segmenter.segment(picture.convert("L").convert("RGB"), points=[POINT]).tobytes()


def disc(x: float, y: float, radius: float, side: int = 40) -> torch.Tensor:
    at = (torch.arange(side) + 0.5) / side
    return (at[:, None] - y).square() + (at - x).square() < radius**2


def test_a_large_object_in_the_middle_is_more_prominent_than_any_other() -> None:
    ground, everything = torch.zeros(40, 40, dtype=torch.bool), torch.ones(40, 40, dtype=torch.bool)
    ground[20:] = True
    best, *others = prominence(
        torch.stack(
            [
                disc(0.5, 0.5, 0.25),
                disc(0.5, 0.5, 0.15),  # smaller
                disc(0.75, 0.5, 0.25),  # aside
                disc(0.5, 0.8, 0.25),  # lower, cut by the edge
                ground,
                everything,
                ~everything,
            ]
        )
    ).tolist()
    assert all(best > other for other in others) and others[-2:] == [0, 0]
    assert 0 < others[3] < others[1] < best <= 1


@pytest.mark.parametrize("point", [(60, 5), (5, 40), (-1, 5), (5, -0.5), (float("nan"), 5)])
def test_a_point_outside_the_picture_is_refused(
    segmenter: Segmenter, picture: Image.Image, point: tuple[float, float]
) -> None:
    with pytest.raises(UserError, match=r"outside the picture: expected x from 0 to 59, y from 0 to 39$"):
        segmenter.segment(picture, points=[POINT, point])


@pytest.mark.parametrize("box", [(10, 5, 9, 20), (5, 5, 5, 20), (-1, 0, 9, 9), (0, 0, 61, 9), (0, 0, 9, 41)])
def test_a_box_outside_the_picture_or_inside_out_is_refused(
    segmenter: Segmenter, picture: Image.Image, box: tuple[float, float, float, float]
) -> None:
    with pytest.raises(UserError, match="is none in the picture: expected left, top, right, bottom"):
        segmenter.segment(picture, box=box)


def drop_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["mask_decoder.iou_token.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change(name: str, **fields: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(
        json.dumps(json.loads((folder / name).read_text()) | fields)
    )


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, "there is no folder"),
        (lambda folder: (folder / "config.json").unlink(), "contains no config.json of a model"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (change("config.json", model_type="clip"), "contains a model of type 'clip', expected SAM"),
        (lambda folder: (folder / "model_index.json").write_text("{}"), "is a diffusion model, expected SAM"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cannot be read"),
        (drop_a_weight, "lacks 1 weights, such as mask_decoder.iou_token.weight"),
        (lambda folder: [file.unlink() for file in folder.glob("*processor*.json")], "cannot be read"),
    ],
)
def test_a_folder_that_is_missing_damaged_or_of_another_kind_is_refused_in_one_line(
    folder: Path, tmp_path: Path, damage: Callable[[Path], Any], says: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "sam"))
    damage(copy)
    with pytest.raises(UserError, match=f"^{re.escape(str(copy))}|^there is no folder") as caught:
        Segmenter.load(str(copy))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_is_neither_a_folder_nor_an_id_of_the_hub_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sam.pt").write_bytes(b"")
    for name, says in {"sam": "there is no folder sam", str(tmp_path / "sam.pt"): "is a file"}.items():
        with pytest.raises(UserError, match=says):
            Segmenter.load(name)
    with pytest.raises(UserError, match=r"^nobody/sam is not a folder, and not available from the hub: "):
        Segmenter.load("nobody/sam")


def test_a_menagerie_without_its_sam_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(menagerie, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"the SAM of the menagerie is missing: .*train_menagerie"):
        Segmenter.load()


@pytest.mark.parametrize("kind", ["sam2", "sam2_video"])
def test_sam_2_without_torchvision_is_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    if find_spec("torchvision"):
        pytest.skip("torchvision is installed")
    copy = Path(shutil.copytree(folder, tmp_path / "sam"))
    change("config.json", model_type=kind)(copy)
    with pytest.raises(UserError, match="is SAM 2, which needs torchvision"):
        Segmenter.load(str(copy))


@pytest.mark.parametrize("kind", ["sam2", "sam2_video"])
def test_sam_2_is_asked_in_the_same_way(picture: Image.Image, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torchvision", reason="transformers prepares pictures for SAM 2 with torchvision")
    folder = segmenters.make_second(tmp_path / "sam2")
    change("config.json", model_type=kind)(folder)
    segmenter = Segmenter.load(str(folder))
    answers = [segmenter.segment(picture), segmenter.segment(picture, points=[POINT], box=BOX)]
    answers += [segmenter.segment(picture, points=[POINT]), segmenter.segment(picture, box=BOX)]
    assert all(mask.size == WIDE and mask.mode == "L" for mask in answers)
    assert len({mask.tobytes() for mask in answers}) > 1
