"""Edits judged without a ground truth: agreement with the target, likeness to the source, and the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kvinv_pl.data.images.geometry import Geometry, shared_colours, to_pixels
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.models.denoiser import Denoiser, generator
from kvinv_pl.models.vision.clip import Clip
from kvinv_pl.stages.settings import EditSettings

LEAST_SHARE = 0.5  # of the best edit's agreement: an edit that has as much has done what the target says
LEVELS = (0.35, 0.5, 0.65, 0.8)  # shares of the noise schedule
NOISES = 2  # at each level


@dataclass(frozen=True)
class Candidate:
    """One edit, and the two figures that it is chosen by."""

    settings: EditSettings
    file: Path
    agreement: float
    """With the target rather than with the source prompt; above 0 where the target fits better."""
    likeness: float
    """To the source picture, wherever its subject has moved."""

    def describe(self, names: Sequence[str]) -> str:
        """Its values of these settings, as start 0.3, guidance 3."""
        return ", ".join(f"{name} {getattr(self.settings, name):g}" for name in names)


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best first: of those that do what the target says, the earliest and then the most like the source.

    An early start keeps more of the subject, and costs at most the action (the paper's Fig. 6), which is seen
    to before.
    """
    least = max(0.0, LEAST_SHARE * max(each.agreement for each in candidates))
    succeeded = [each for each in candidates if each.agreement > 0 and each.agreement >= least]
    others = [each for each in candidates if each not in succeeded]
    return [
        *sorted(succeeded, key=lambda each: (each.settings.start, -each.likeness)),
        *sorted(others, key=lambda each: -each.agreement),
    ]


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both, from the most like the source on."""
    return [candidates[n] for n in pareto_optimal([(each.agreement, each.likeness) for each in candidates])]


def pareto_optimal(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other is better than in one and as good in the other, by their first figure.

    Those with NaN are none.
    """

    def is_dominated(a: tuple[float, float]) -> bool:
        return any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in points)

    known = [n for n, point in enumerate(points) if not any(map(math.isnan, point))]
    return sorted((n for n in known if not is_dominated(points[n])), key=lambda n: points[n][0])


@torch.no_grad()
def denoising_agreement(denoiser: Denoiser, z_0: Float[Tensor, "1 c h w"], source: str, target: str) -> float:
    """Which prompt predicts the noise in a picture better (Li et al., 2023), by the model itself.

    That is (error under the source - error under the target) / error under the source, squared errors.
    """
    backbone, errors = denoiser.backbone, torch.zeros(2)
    contexts = backbone.embed([source, target])[:, None].expand(-1, NOISES, -1, -1)
    for level in LEVELS:
        t = int(level * (len(backbone.alphas_cumprod) - 1))
        noise = torch.randn((NOISES, *z_0.shape[1:]), generator=generator(0, "agreement", t)).to(z_0)
        z, true = backbone.noised(z_0, noise, t), backbone.true_output(z_0, noise, t)
        out = denoiser.branches(z, torch.full((NOISES,), t, device=z.device), contexts)
        errors += (out - true).square().flatten(1).mean(1).cpu()
    return float((errors[0] - errors[1]) / errors[0])


@dataclass(frozen=True)
class EditJudge:
    """Measures the edits of one image: by CLIP, or without it by the model itself."""

    denoiser: Denoiser
    image: SourceImage
    clip: Clip | None

    @cached_property
    def _source(self) -> Image.Image:
        return open_picture(self.image.store.folder / "source.png").image

    def candidate(self, settings: EditSettings, file: Path, target: str) -> Candidate:
        """An edit with its two figures: by CLIP's directions, or by the model's errors and by colours."""
        edited, source = open_picture(file).image, self.image.source
        if self.clip is not None:
            embedding = self.clip.of_picture(edited)
            direction = self.clip.of_text(target) - self.clip.of_text(source)
            likeness = 100 * float(embedding @ self.clip.of_picture(self._source))
            return Candidate(settings, file, 100 * float(embedding @ direction), likeness)
        geometry = Geometry(edited.size, self.image.store.geometry().resized)
        z_0 = self.denoiser.backbone.encode(to_pixels(edited, geometry)[None].to(self.denoiser.device))
        agreement = denoising_agreement(self.denoiser, z_0, source, target)
        return Candidate(settings, file, agreement, shared_colours(self._source, edited))
