"""What tuning leaves of a picture: its files, phase by phase, what the loggers get, and its certificate."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.data.runs.tensors import Bars
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.data.writer import Writer
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.stages.progress import Observers
from kvinv_pl.stages.tuning.certificate import Attempt, certify

GOOD_ROUND_TRIP = 25.0
"""dB to a picture of the embedded VAE's round trip; its drawn animals come back at 30 to 33."""


class Results:
    """Writes the phases of pictures at one attempt, by `writer`, and their certificates; and logs both."""

    def __init__(self, denoiser: Denoiser, attempt: Attempt, observers: Observers) -> None:
        self.denoiser, self.attempt, self.observers = denoiser, attempt, observers
        self.writer = Writer(observers.failures)

    def write(
        self,
        image: SourceImage,
        i: int,
        psi: Mapping[str, Tensor],
        kv: Mapping[str, Bars] | None,
        figures: Mapping[str, float],
        z_from: Float[Tensor, "1 c h w"],
        z_to: Float[Tensor, "1 c h w"],
    ) -> None:
        """Write psi_t, z-tilde after the step, and K-bar and V-bar if they are stored."""
        dtype, name = self.attempt.settings.store_dtype, self.attempt.log_name(image)
        image.store.save_step(i, psi, z_to[0], kv, figures, dtype, self.writer.submitter(image))
        self._log(name, i, figures)
        table, every = self.denoiser.table, self.observers.x_0_every
        if self.observers.loggers and every and i % every == 0 and table.has_effect(i):  # the paper's Fig. 3
            z_0 = table.predicted_z_0(z_from, z_to, i)
            pixels = self.denoiser.backbone.decode(z_0)[0].cpu()
            log_picture(self.observers.loggers, f"{name}/predicted_x_0", i, pixels)

    def write_at_pivot(
        self, image: SourceImage, i: int, psi: Mapping[str, Tensor], figures: Mapping[str, float]
    ) -> None:
        """Write psi_t as tuned at its pivot, for the roll-out to start from."""
        dtype = self.attempt.settings.store_dtype
        image.store.save_pivot(i, psi, figures, dtype, self.writer.submitter(image))
        self._log(f"{self.attempt.log_name(image)}/at_pivot", i, figures)

    def certify(self, images: Sequence[SourceImage]) -> None:
        """Write the certificates of tuned pictures, and show their PSNR."""
        quality = list[float]()
        for image in images:
            with self.observers.failures.catching([image]):
                quality.append(self._certify(image))
        demanded = self.attempt.settings.required_psnr
        below = sum(value < demanded for value in quality)
        missed = f"; {below} of {len(quality)} below the {demanded:g} dB required" if below else ""
        shown = ", ".join(f"{value:.1f}" for value in quality)
        self.observers.progress.finish(f"reconstruction {shown} dB to the VAE round trip{missed}")

    def certify_rest(self, images: Sequence[SourceImage]) -> None:
        """Certify those that are tuned but not certified, after an interrupted fit; and say nothing."""
        for image in images:
            with self.observers.failures.catching([image]):
                if image not in self.observers.failures and self.attempt.is_due(image):
                    self._certify(image)

    def _certify(self, image: SourceImage) -> float:
        """Write the certificate of a tuned picture; its PSNR to the VAE round trip in dB."""
        record = certify(self.denoiser, image.store, self.attempt)
        name = image.store.folder.name
        metrics = {f"{name}/{key}": value for key, value in record.items() if key.startswith("psnr_")}
        for logger in self.observers.loggers:
            logger.log_metrics(metrics, step=len(record["attempts"]) - 1)
        psnr = record["psnr_of_round_trip_to_source"]
        embedded = self.denoiser.backbone.identity["checkpoint"] == "menagerie"
        if embedded and psnr < GOOD_ROUND_TRIP and self.attempt.number == 0:
            self.observers.progress.note(
                f"{image.name}: the embedded model knows its drawn animals alone, and gives this picture "
                f"back at {psnr:.1f} dB: for a photograph, give --config configs/sd15.yaml or --checkpoint"
            )
        return record["psnr_to_round_trip"]

    def _log(self, name: str, i: int, figures: Mapping[str, float]) -> None:
        """Log the figures of phase i (from noise), and the peak memory, under the picture's name."""
        if self.observers.loggers:
            metrics = {f"{name}/{key}": value for key, value in figures.items()}
            metrics |= {f"{name}/peak_memory_gib": peak_memory(self.denoiser.device) / 2**30}
            for logger in self.observers.loggers:
                logger.log_metrics(metrics, step=i)


def log_picture(loggers: Sequence[Any], name: str, i: int, pixels: Float[Tensor, "3 h w"]) -> None:
    """Write a picture (pixels in -1 .. 1) to the loggers that support pictures."""
    for logger in loggers:
        if callable(add_image := getattr(getattr(logger, "experiment", None), "add_image", None)):
            add_image(name, ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), i)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the GPU, or elsewhere of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
