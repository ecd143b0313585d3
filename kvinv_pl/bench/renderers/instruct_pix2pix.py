"""InstructPix2Pix (Brooks et al., 2023), among the methods."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image

from kvinv_pl.api import KVInverter
from kvinv_pl.bench.methods import loading
from kvinv_pl.bench.running import load_picture
from kvinv_pl.data.images.geometry import fit_geometry, to_image, to_pixels
from kvinv_pl.errors import UserError
from kvinv_pl.models.published.instruct_pix2pix import InstructPix2PixModel

_loaded = lru_cache(maxsize=1)(InstructPix2PixModel.load)  # of the row that is computed


@dataclass(frozen=True)
class InstructPix2Pix:
    """InstructPix2Pix (Brooks et al., 2023, Eq. 3): a model trained on instructions, by its own checkpoint.

    The picture is encoded beside the noise, and two scales say how much picture and instruction count. The
    U-Net has 8 input channels where Stable Diffusion has 4; what the model is that others are compared on
    does not matter. There is no reconstruction.

    Args:
        checkpoint: A diffusers folder, or a hub id, which is downloaded.
        instruction: The instruction; {source} and {target} stand for the prompts.
        steps: Number of sampling steps, whatever other methods use.
        guidance: s_T, the scale of the instruction.
        image_guidance: s_I, the scale of the picture, 1 or more.
        seed: Seed of the noise.
    """

    checkpoint: str = "timbrooks/instruct-pix2pix"
    instruction: str = "make it {target}"
    steps: int = 100
    guidance: float = 7.5
    image_guidance: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be told or sampled."""
        if self.steps < 1 or self.image_guidance < 1:
            got = f"{self.steps} and {self.image_guidance}"
            raise UserError(f"steps, image_guidance: expected 1 or more, got {got}")
        self._prompt("", "")

    def prepare(self, model: KVInverter) -> None:
        """Load, or fetch, the checkpoint."""
        self._load(model)

    def render(
        self,
        model: KVInverter,
        picture: Image.Image | str | Path,
        source: str,
        target: str,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Image.Image:
        """The edited picture, in the size that it came in; the model says where and how precisely."""
        image, (loaded, device, dtype) = load_picture(picture), self._load(model)
        geometry = fit_geometry(image.size, loaded.sample_size, loaded.multiple, "keep")
        pixels = to_pixels(image, geometry)[None].to(device, dtype)
        w = self.guidance if guidance is None else guidance
        edited = loaded.edit(
            pixels, self._prompt(source, target), steps or self.steps, w, self.image_guidance, self.seed
        )
        return to_image(edited[0].cpu(), geometry)

    def _load(self, model: KVInverter) -> tuple[InstructPix2PixModel, torch.device, torch.dtype]:
        """The checkpoint where the model runs, in its precision."""
        trainer = model.trainer()
        device, dtype = trainer.strategy.root_device, trainer.settle_precision(model.model)
        with loading("instruct_pix2pix", "checkpoint"):
            return _loaded(self.checkpoint, device, dtype), device, dtype

    def _prompt(self, source: str, target: str) -> str:
        try:
            return self.instruction.format(source=source, target=target)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"instruction: expected text with {{source}} and {{target}} alone, got {self.instruction!r}"
            ) from error
