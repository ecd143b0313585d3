"""KV Inversion itself, among the methods."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from kvinv_pl.api import KVInverter
from kvinv_pl.errors import UserError


@dataclass(frozen=True)
class KVInversionEdit:
    """KV Inversion (Huang et al., 2023, Algorithm 1) by this package's three stages.

    Its variant, its layers and all settings of tuning are those that the model was loaded with.

    Args:
        mask_given: Whether it is given the mask of the subject, for the variant `masked`.
    """

    mask_given: bool = False

    def render(
        self,
        model: KVInverter,
        picture: Image.Image | str | Path,
        source: str,
        target: str,
        steps: int | None = None,
        guidance: float | None = None,
        mask: Image.Image | None = None,
    ) -> tuple[Image.Image, Image.Image]:
        """Tune the picture and edit it; the edit, and the reconstruction."""
        if steps not in (None, model.model.steps):
            raise UserError(
                f"steps: expected {model.model.steps}, with which the model was loaded, got {steps}"
            )
        run = model.tune(picture, source, mask=mask)
        return run.edit(target, guidance=guidance), run.reconstruction
