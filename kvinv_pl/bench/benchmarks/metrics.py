"""The figures of PIE-Bench (Ju et al., 2024), as published and as they should be."""

import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from kvinv_pl.bench.benchmarks.cases import Case, Metric
from kvinv_pl.bench.tables.columns import CAPPED
from kvinv_pl.models.vision.clip import Clip
from kvinv_pl.models.vision.dino import Dino
from kvinv_pl.models.vision.lpips import SMALLEST as SMALLEST_FOR_LPIPS
from kvinv_pl.models.vision.lpips import Lpips, spread

SMALLEST = 11  # pixels a side, the window of SSIM
UNEDITED = Metric(
    "unedited",
    (
        *("PIE PSNR", "PIE MSE x10^4", "PIE SSIM x10^2"),
        *("unedited PSNR", "unedited MSE x10^4", "unedited SSIM x10^2"),
    ),
    lambda case, picture: unedited(case, picture),
)
"""How much of the source is left where nothing was to be edited.

PIE: both pictures are black where they may be edited, and means are over the whole frame, as published, so
that a large mask is rewarded; the other three are means over the unedited pixels alone.
"""


def unedited(case: Case, picture: Image.Image) -> Mapping[str, float]:
    """Against the source, away from where the case may be edited; NaN where all of it may."""
    region = case.editable
    if region is None or region.all():
        return dict.fromkeys(UNEDITED.columns, math.nan)
    keep = ~region
    source, edited = (np.asarray(each.convert("RGB"), np.float64) / 255 for each in (case.picture(), picture))
    error = np.square(source - edited).mean(-1)
    found = dict[str, float]()
    for rule, mse in (("PIE", (error * keep).mean()), ("unedited", error[keep].mean())):
        found[f"{rule} PSNR"] = min(CAPPED, -10 * math.log10(mse)) if mse > 0 else CAPPED
        found[f"{rule} MSE x10^4"] = 1e4 * float(mse)
    if min(keep.shape) < SMALLEST:
        return found | {f"{rule} SSIM x10^2": math.nan for rule in ("PIE", "unedited")}
    black = [_black_where(region, each) for each in (source, edited)]
    found["PIE SSIM x10^2"] = 100 * float(_ssim(*black).mean())
    found["unedited SSIM x10^2"] = 100 * float(_ssim(source, edited).mean(0)[keep].mean())
    return found


def _black_where(region: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """As PIE-Bench takes the part out that may be edited."""
    return picture * ~region[..., None]


def _ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The map (3, h, w) of SSIM (Wang et al., 2004)."""
    x, y = (torch.from_numpy(each).permute(2, 0, 1)[None].float() for each in (a, b))
    found = structural_similarity_index_measure(x, y, data_range=1.0, return_full_image=True)
    return found[1][0].numpy()


def clip_score(folder: str, device: str = "cpu") -> Metric:
    """Agreement with the target prompt: of the picture, and of what may be edited with black around it."""
    clip = Clip.load(folder, device)

    def measure(case: Case, picture: Image.Image) -> Mapping[str, float]:
        region, edited = case.editable, math.nan
        if region is not None:
            edited = clip.score(black_but(picture, region), case.target)
        return {"CLIP whole": clip.score(picture, case.target), "CLIP edited": edited}

    return Metric("clip", ("CLIP whole", "CLIP edited"), measure, folder)


def structure_distance(folder: str, device: str = "cpu") -> Metric:
    """DINO's structure distance to the source, times 1000; PIE: of pictures in 0 ... 255, as published."""
    dino = Dino.load(folder, device)

    def measure(case: Case, picture: Image.Image) -> Mapping[str, float]:
        source = case.picture()
        return {
            "PIE structure x10^3": 1e3 * dino.distance(source, picture, 255.0),
            "structure x10^3": 1e3 * dino.distance(source, picture),
        }

    return Metric("dino", ("PIE structure x10^3", "structure x10^3"), measure, folder)


def lpips(file: str, device: str = "cpu") -> Metric:
    """LPIPS of the unedited part against the source, times 1000, by SqueezeNet.

    PIE: of pictures that are black where they may be edited, the mean over the whole frame, as published; the
    other is the mean over the unedited pixels of the pictures as they are. The channels' weights are those
    that torchmetrics brings along.
    """
    linear = Path(str(files("torchmetrics"))) / "functional" / "image" / "lpips_models" / "squeeze.pth"
    model, columns = Lpips.load(file, linear, device), ("PIE LPIPS x10^3", "unedited LPIPS x10^3")

    def measure(case: Case, picture: Image.Image) -> Mapping[str, float]:
        region = case.editable
        if region is None or region.all() or min(region.shape) < SMALLEST_FOR_LPIPS:
            return dict.fromkeys(columns, math.nan)
        pair = [np.asarray(each.convert("RGB"), np.float32) / 255 for each in (case.picture(), picture)]
        whole, black = (
            [torch.from_numpy(each).permute(2, 0, 1)[None].to(device) * 2 - 1 for each in pictures]
            for pictures in (pair, [_black_where(region, each) for each in pair])
        )
        published = sum(float(each.mean()) for each in model.distances(black[0], black[1]))
        where = spread(model.distances(whole[0], whole[1]), (region.shape[0], region.shape[1]))[0, 0]
        mean_unedited = float(where.cpu()[torch.from_numpy(~region)].mean())
        return dict(zip(columns, (1e3 * published, 1e3 * mean_unedited), strict=True))

    return Metric("lpips", columns, measure, file)


def black_but(picture: Image.Image, region: np.ndarray) -> Image.Image:
    """The picture in a region, and black elsewhere."""
    return Image.fromarray(np.asarray(picture.convert("RGB")) * region[..., None].astype(np.uint8))
