"""One picture through one method: an inversion and an edit, or a method that is both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from kvinv_pl.algorithm.ddim import StepTable
from kvinv_pl.algorithm.method import Editor, Inversion, Learner, Renderer, Scene, sample
from kvinv_pl.api import KVInverter
from kvinv_pl.bench.methods import make
from kvinv_pl.bench.network import Network
from kvinv_pl.data.masks import fitted
from kvinv_pl.data.pictures import Geometry, fit_geometry, open_picture, to_image, to_pixels
from kvinv_pl.errors import UserError
from kvinv_pl.models.stable_diffusion import Backbone


def run_method(
    model: KVInverter,
    picture: Image.Image | str | Path,
    source: str,
    target: str,
    *,
    inversion: str | Inversion = "ddim",
    editor: str | Editor | Renderer = "plain",
    steps: int | None = None,
    guidance: float | None = None,
    mask: Image.Image | None = None,
    seed: int = 0,
) -> Image.Image:
    """The picture edited by an inversion and an edit, in the size that it came in.

    Args:
        model: Of `kvinv_pl.load`; nothing is left in it.
        picture: A picture, or the path of one.
        source: What it shows.
        target: What it should become.
        inversion: A name that `kvinv methods` lists, or an inversion of your own making.
        editor: The same for edits, and for methods that have no inversion.
        steps: Left out, those that the model was loaded with.
        guidance: The scale of the target; left out, the published one of the edit or else of the inversion.
        mask: White where the picture may change, for methods that take one.
        seed: Of methods that draw.
    """
    chosen = make(editor, "edit", "whole") if isinstance(editor, str) else editor
    image = picture if isinstance(picture, Image.Image) else open_picture(picture).image
    if isinstance(chosen, Renderer):
        if inversion != "ddim":
            raise UserError(
                f"inversion: expected ddim with {editor}, which inverts by itself, got {inversion}"
            )
        given = {"steps": steps, "guidance": guidance, "mask": mask, "seed": seed}
        return chosen.render(
            model, image, source, target, **{k: v for k, v in given.items() if v is not None}
        )
    inverting = make(inversion, "inversion") if isinstance(inversion, str) else inversion
    canvas = Canvas.of(model, image)
    w = next(w for w in (guidance, chosen.guidance, inverting.guidance) if w is not None)
    scene = canvas.scene("" if chosen.empty_source else source, target, w, steps, mask, seed)
    return canvas.show(edited(scene, inverting, chosen)[1:])


def edited(scene: Scene, inversion: Inversion, editor: Editor) -> Float[Tensor, "2 c h w"]:
    """The source and the target at the end of sampling."""
    with torch.no_grad():
        inverted = inversion.invert(scene)
    for method in (inversion, editor):
        if isinstance(method, Learner):
            inverted = method.learn(scene, inverted)
    return sample(scene, inverted, editor.control(scene, inverted))


@dataclass(frozen=True, eq=False)
class Canvas:
    """A picture in a model's size, and the way back to the size that it came in."""

    backbone: Backbone
    steps: int
    geometry: Geometry
    z_0: Float[Tensor, "1 c h w"]

    @classmethod
    def of(cls, model: KVInverter, image: Image.Image) -> Canvas:
        """Encode a picture; what CP-attn has in the U-Net is taken out first."""
        backbone = model.model.load_backbone(torch.float32)
        model.model.denoiser.release()
        backbone.to(model.trainer().strategy.root_device)
        geometry = fit_geometry(image.size, backbone.sample_size, backbone.multiple, "keep")
        pixels = to_pixels(image, geometry)[None].to(backbone.alphas_cumprod.device)
        return cls(backbone, model.model.steps, geometry, backbone.encode(pixels))

    def scene(
        self,
        source: str,
        target: str,
        guidance: float,
        steps: int | None = None,
        mask: Image.Image | None = None,
        seed: int = 0,
    ) -> Scene:
        """What methods are given."""
        network = Network(self.backbone, (self.z_0.shape[-2], self.z_0.shape[-1]))
        table: Any = self.backbone.step_table(self.steps if steps is None else steps)
        if not isinstance(table, StepTable):
            raise UserError("the methods to compare with are written for DDIM: use a model of that kind")
        region = None
        if mask is not None:
            region = fitted(mask, self.geometry, "the mask")[None, None].to(self.z_0)
            region = interpolate(region, self.z_0.shape[-2:], mode="area")
        return Scene(network, table, self.z_0, source, target, guidance, region, seed)

    def show(self, z: Float[Tensor, "1 c h w"]) -> Image.Image:
        """Decode."""
        return to_image(self.backbone.decode(z)[0].cpu(), self.geometry)
