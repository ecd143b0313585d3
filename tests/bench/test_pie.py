"""PIE-Bench on a miniature of its published layout, and its figures against an independent computation."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import checkpoints
import fits
import numpy as np
import pytest
import torch
from PIL import Image

from kvinv_pl.bench.benchmarks.image_list import image_list
from kvinv_pl.bench.benchmarks.metrics import UNEDITED, black_but, clip_score, lpips, unedited
from kvinv_pl.bench.benchmarks.pie import KINDS, SIDE, PieCase, is_pie_bench, mask_of, pie_bench
from kvinv_pl.errors import UserError
from kvinv_pl.models.vision.clip import MEAN, STD, Clip
from kvinv_pl.models.vision.lpips import Lpips, spread, squeezenet


def entry(path: str, kind: int, **others: Any) -> dict[str, Any]:
    return {
        "image_path": path, "original_prompt": "a [white] cat [sitting]",
        "editing_prompt": "a [white] cat [running]", "editing_instruction": "", "blended_word": "cat cat",
        "editing_type_id": str(kind), "mask": [513, 3], **others,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures; the third as PIE-Bench++ has it."""
    mapping = {
        "000000000000": entry("0_random_140/0.png", 0),
        "511000000000": entry("5_change_attribute_pose_40/5.png", 5),
        "900000000000": {
            "image_path": "9_change_style_80/9.png", "source_prompt": "a cat", "target_prompt": "a [dog]",
            "mask": f"0 {SIDE * SIDE}",
        },
    }  # fmt: skip
    for n, each in enumerate(mapping.values()):
        fits.picture(tmp_path / "annotation_images" / str(each["image_path"]), seed=n)
    (tmp_path / "mapping_file.json").write_text(json.dumps(mapping))
    return tmp_path


def test_the_published_layout_is_read_pose_first_and_prompts_lose_their_brackets(folder: Path) -> None:
    assert is_pie_bench(folder) and not is_pie_bench(folder / "annotation_images")
    data = pie_bench(folder, None, [UNEDITED])
    assert [case.kind for case in data.cases] == ["5 pose", "0 random", "9 style"]
    pose, _, style = data.cases
    assert (pose.name, pose.source, pose.target) == (
        "511000000000",
        "a white cat sitting",
        "a white cat running",
    )
    assert (style.source, style.target) == ("a cat", "a dog")
    assert style.editable is not None and style.editable.all() and style.editable.shape == (16, 16)
    assert len(pie_bench(folder, 2, []).cases) == 2 and len(KINDS) == 10
    assert list(data.references) == ["source", "source through the VAE"]
    assert fits.levels(data.references["source"](pose), pose.picture()) == 0


def test_a_mask_is_runs_over_the_rows_within_a_frame() -> None:
    mask = mask_of([SIDE + 7, 3, 5 * SIDE - 2, 4, SIDE * SIDE - 1, 9])
    inner = mask[1:-1, 1:-1]
    assert mask[[0, -1]].all() and mask[:, [0, -1]].all()
    assert {(int(y) + 1, int(x) + 1) for y, x in np.argwhere(inner)} == {
        (1, 7),
        (1, 8),
        (1, 9),
        (5, 1),
        (4, 510),
    }
    assert not mask_of([])[1:-1, 1:-1].any()


def test_a_method_is_given_the_mask_without_the_frame(tmp_path: Path) -> None:
    case = PieCase("a", "a cat", "a dog", fits.picture(tmp_path / "a.png", (SIDE, SIDE)), runs=(5 * SIDE, 9))
    assert case.editable is not None and case.editable[0].all() and case.editable.sum() > SIDE
    assert np.argwhere(case.mask).tolist() == [[5, x] for x in range(9)]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"editing_type_id": "10"}, "is of the type '10', expected 0 to 9"),
        ({"image_path": "0_random_140/none.png"}, "names .*none.png, which is not there"),
        ({"mask": ["x"]}, "is not a mapping file of PIE-Bench"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(
    folder: Path, change: dict[str, Any], wanted: str
) -> None:
    file = folder / "mapping_file.json"
    file.write_text(json.dumps({"1": entry("0_random_140/0.png", 0) | change}))
    with pytest.raises(UserError, match=wanted):
        pie_bench(folder, None, [])


def test_a_mapping_file_without_prompts_is_none(folder: Path) -> None:
    (folder / "mapping_file.json").write_text('{"1": {"image_path": "0_random_140/0.png"}}')
    with pytest.raises(UserError, match="KeyError 'source_prompt'"):
        pie_bench(folder, None, [])


@dataclass
class Given:
    """A case of given pixels."""

    pixels: np.ndarray
    editable: np.ndarray | None
    name: str = "given"
    kind: str = ""
    source: str = ""
    target: str = ""
    mask: np.ndarray | None = None
    fingerprint: str = ""
    seen: list[str] = field(default_factory=list)

    def picture(self) -> Image.Image:
        return Image.fromarray(self.pixels)


def test_the_unedited_part_is_measured_as_published_and_by_itself() -> None:
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    edited = np.clip(source.astype(int) + rng.integers(-40, 40, source.shape), 0, 255).astype(np.uint8)
    mask = np.zeros((24, 24), bool)
    mask[6:18, 4:20] = True
    found = unedited(Given(source, mask), Image.fromarray(edited))
    squares = [
        ((int(a) - int(b)) / 255) ** 2
        for a, b in zip(source[~mask].ravel(), edited[~mask].ravel(), strict=True)
    ]
    assert found["unedited MSE x10^4"] == pytest.approx(1e4 * sum(squares) / len(squares))
    assert found["PIE MSE x10^4"] == pytest.approx(1e4 * sum(squares) / source.size)
    assert found["PIE PSNR"] == pytest.approx(-10 * math.log10(sum(squares) / source.size))
    assert found["PIE SSIM x10^2"] == pytest.approx(100 * ssim_by_hand(source, edited, mask), abs=1e-3)
    assert found["unedited SSIM x10^2"] < found["PIE SSIM x10^2"]
    assert set(found) == set(UNEDITED.columns)


def ssim_by_hand(source: np.ndarray, edited: np.ndarray, mask: np.ndarray) -> float:
    """Wang et al. (2004): an 11 x 11 Gaussian window of sigma 1.5 at every pixel, mirrored at the edges."""
    at = np.arange(-5, 6)
    line = np.exp(-(at**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    total = []
    for channel in range(3):
        x, y = (
            np.pad(picture[..., channel] / 255 * ~mask, 5, mode="reflect") for picture in (source, edited)
        )
        for row in range(mask.shape[0]):
            for column in range(mask.shape[1]):
                a, b = (each[row : row + 11, column : column + 11] for each in (x, y))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * a * a).sum() - mean_a**2, (window * b * b).sum() - mean_b**2
                both = (window * a * b).sum() - mean_a * mean_b
                total.append(
                    (2 * mean_a * mean_b + 0.01**2) * (2 * both + 0.03**2)
                    / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2))
                )  # fmt: skip
    return float(np.mean(total))


def test_lpips_of_the_unedited_part_is_published_over_the_frame_and_also_of_its_own_pixels(
    tmp_path: Path,
) -> None:
    """The first on blackened pictures; the second does not see what changes where it may."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = {f"features.{name}": tensor for name, tensor in squeezenet().state_dict().items()}
    torch.save(weights, tmp_path / "squeezenet.pth")
    metric = lpips(str(tmp_path / "squeezenet.pth"))
    rng = np.random.default_rng(0)
    source, edited = (rng.integers(0, 256, (48, 40, 3), dtype=np.uint8) for _ in range(2))
    mask = np.zeros((48, 40), bool)
    mask[:, :20] = True
    found = metric.measure(Given(source, mask), Image.fromarray(edited))
    linear = Path(str(files("torchmetrics"))) / "functional" / "image" / "lpips_models" / "squeeze.pth"
    model = Lpips.load(tmp_path / "squeezenet.pth", linear)

    def unit(pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]

    black = [unit(np.where(mask[..., None], 0, each)) for each in (source, edited)]
    frame = sum(float(each.mean()) for each in model.distances(black[0], black[1]))
    assert found["PIE LPIPS x10^3"] == pytest.approx(1e3 * frame, rel=1e-4)
    where = spread(model.distances(unit(source), unit(edited)), (48, 40))[0, 0].numpy()
    assert found["unedited LPIPS x10^3"] == pytest.approx(1e3 * float(where[~mask].mean()), rel=1e-4)
    small = Given(source[:16, :16], mask[:16, 4:20])
    assert all(map(math.isnan, metric.measure(small, Image.fromarray(source[:16, :16])).values()))
    assert all(map(math.isnan, metric.measure(Given(source, None), Image.fromarray(source)).values()))


def test_clip_scores_are_100_times_the_cosine_of_the_picture_and_of_what_may_be_edited(
    tmp_path: Path,
) -> None:
    folder = checkpoints.clip(tmp_path / "clip")
    clip = Clip.load(folder)
    mask = np.zeros((clip.size, clip.size), bool)
    mask[: clip.size // 2] = True
    cosines = []
    for text in ("a cat running", "a dog sitting"):
        rng = np.random.default_rng(len(text))
        edited = rng.integers(0, 256, (clip.size, clip.size, 3), dtype=np.uint8)
        found = clip_score(str(folder)).measure(Given(edited, mask, target=text), Image.fromarray(edited))
        for name, pixels in (("whole", edited), ("edited", np.where(mask[..., None], edited, 0))):
            x = torch.from_numpy(pixels / 255).permute(2, 0, 1)
            mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
            tokens = clip.tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                out = clip.model(input_ids=tokens, pixel_values=((x - mean) / std)[None].float())
            cosines.append(float(out.text_embeds[0] @ out.image_embeds[0]))
            assert found[f"CLIP {name}"] == pytest.approx(100 * max(0.0, cosines[-1]), abs=1e-3)
    assert max(cosines) > 0


def test_what_is_equal_has_100_dB_and_where_all_may_be_edited_nothing_is_known() -> None:
    source = np.zeros((16, 16, 3), np.uint8)
    nothing = np.zeros((16, 16), bool)
    same = unedited(Given(source, nothing), Image.fromarray(source))
    assert same["PIE PSNR"] == 100 and same["PIE SSIM x10^2"] == pytest.approx(100)
    for mask in (~nothing, None):
        assert all(map(math.isnan, unedited(Given(source, mask), Image.fromarray(source)).values()))


def test_what_may_be_edited_alone_is_left_for_clip() -> None:
    mask = np.zeros((4, 4), bool)
    mask[1, 2] = True
    seen = np.asarray(black_but(Image.new("RGB", (4, 4), "white"), mask))
    assert seen.sum() == 3 * 255 and (seen[1, 2] == 255).all()


def test_a_list_of_ones_own_has_a_case_for_each_target_and_masks_of_what_may_be_edited(
    tmp_path: Path,
) -> None:
    fits.picture(tmp_path / "cat.png")
    Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    rows = "image,source,targets,mask\ncat.png,a cat,a dog|a horse,mask.png\n"
    (tmp_path / "list.csv").write_text(rows)
    one, two = image_list(tmp_path / "list.csv", None, []).cases
    assert (one.name, one.target, two.name, two.target) == ("0001-cat", "a dog", "0002-cat", "a horse")
    assert one.editable is not None and (one.editable == np.eye(16, dtype=bool)).all()
    (tmp_path / "list.csv").write_text("image,source\ncat.png,a cat\n")
    with pytest.raises(UserError, match=r"cat.png has no target"):
        image_list(tmp_path / "list.csv", None, [])
    (tmp_path / "list.csv").write_text(rows)
    assert [case.name for case in image_list(tmp_path, None, []).cases] == [
        "0001-cat",
        "0002-cat",
    ]  # its folder
    (tmp_path / "other.csv").write_text(rows)
    with pytest.raises(UserError, match=r"a folder with one list in it, got .* with 2 lists"):
        image_list(tmp_path, None, [])
