"""One picture through one method: an inversion and an edit, or a method that is both."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kvinv_pl.algorithm.method import Editor, Inversion, Renderer, Scene, sample
from kvinv_pl.api import KVInverter, as_file
from kvinv_pl.bench.methods import make, methods
from kvinv_pl.bench.network import Network
from kvinv_pl.data.images.geometry import Geometry, fit_geometry, to_image, to_pixels
from kvinv_pl.data.images.masks import open_mask
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.errors import UserError
from kvinv_pl.models.denoiser import Denoiser


def run_method(
    model: KVInverter,
    picture: Image.Image | str | Path,
    source: str,
    target: str,
    *,
    inversion: str | Inversion | None = None,
    editor: str | Editor | Renderer = "plain",
    steps: int | None = None,
    guidance: float | None = None,
    mask: Image.Image | str | Path | None = None,
) -> Image.Image:
    """The picture edited by an inversion and an edit, in the size that it came in.

    Args:
        model: Of `kvinv_pl.load`, in the precision that it was loaded with; nothing is left in it.
        picture: A picture, or the path of one.
        source: What it shows.
        target: What it should become.
        inversion: A name that `kvinv methods` lists, or an inversion of your own making; left out, ddim.
        editor: The same for edits, and for methods that have no inversion.
        steps: Left out, those that the model was loaded with.
        guidance: The scale of the target; left out, the published one of the edit or else of the inversion.
        mask: White where the subject is, or its path, for methods with the option `mask_given`.
    """
    chosen = make(editor, "edit", "whole") if isinstance(editor, str) else editor
    if mask is not None and isinstance(editor, str) and hasattr(chosen, "mask_given"):
        chosen = make(editor, "edit", "whole", mask_given=True)
    if isinstance(chosen, Renderer) and inversion is not None:
        raise UserError(f"inversion: expected none with {editor}, which inverts by itself, got {inversion}")
    inverting = make(inversion, "inversion") if isinstance(inversion, str) else inversion
    shown = None if mask is None else load_mask(mask)
    return apply_method(model, picture, source, target, inverting, chosen, steps, guidance, shown).edited


@dataclass(frozen=True)
class MethodResult:
    """What a method made of a picture, in the size that it came in."""

    edited: Image.Image
    reconstruction: Image.Image | None
    """The source as the method samples it; None where it has none."""


def apply_method(
    model: KVInverter,
    picture: Image.Image | str | Path,
    source: str,
    target: str,
    inversion: Inversion | None,
    editor: Editor | Renderer,
    steps: int | None = None,
    guidance: float | None = None,
    mask: Image.Image | None = None,
) -> MethodResult:
    """`run_method` with the reconstruction beside the edit."""
    if takes_mask(editor) and mask is None:
        raise UserError("mask_given: expected a mask with the picture, got none: add one, or leave it out")
    if mask is not None and not takes_mask(editor):
        raise UserError(
            f"mask: expected none with {type(editor).__name__}: leave it out, or take one of "
            f"{', '.join(name for name, each in methods().items() if 'mask_given' in each.options)} with "
            "mask_given=True"
        )
    given = {} if mask is None else {"mask": mask}
    if isinstance(editor, Renderer):
        rendered = editor.render(model, picture, source, target, steps, guidance, **given)
        return MethodResult(*rendered) if isinstance(rendered, tuple) else MethodResult(rendered, None)
    inverting: Inversion = make("ddim", "inversion") if inversion is None else inversion
    encoded = Encoded.encode(model, picture)
    w = next(w for w in (guidance, editor.guidance, inverting.guidance) if w is not None)
    scene = encoded.scene("" if editor.empty_source else source, target, w, steps)
    z = sample_edit(scene, inverting, editor)
    return MethodResult(encoded.decode(z[1:]), encoded.decode(z[:1]))


def takes_mask(editor: Editor | Renderer) -> bool:
    """Whether a method is given a mask of the subject."""
    return isinstance(editor, Renderer) and bool(getattr(editor, "mask_given", False))


def sample_edit(scene: Scene, inversion: Inversion, editor: Editor) -> Float[Tensor, "2 c h w"]:
    """The source and the target at the end of sampling."""
    with torch.no_grad():
        inverted = inversion.invert(scene)
        return sample(scene, inverted, editor.control(inverted.scene, inverted))


def load_picture(picture: Image.Image | str | Path) -> Image.Image:
    """A picture, or the one at a path, as pictures are read for tuning."""
    with tempfile.TemporaryDirectory(prefix="kvinv-") as scratch:
        return open_picture(as_file(picture, Path(scratch), "picture")).image


def load_mask(mask: Image.Image | str | Path) -> Image.Image:
    """A mask, or the one at a path, as masks are read for tuning: grey, white on the subject."""
    with tempfile.TemporaryDirectory(prefix="kvinv-") as scratch:
        return open_mask(as_file(mask, Path(scratch), "mask")).image


@dataclass(frozen=True, eq=False)
class Encoded:
    """A picture in a model's size, and the way back to the size that it came in."""

    denoiser: Denoiser
    steps: int
    geometry: Geometry
    z_0: Float[Tensor, "1 c h w"]

    @classmethod
    def encode(cls, model: KVInverter, picture: Image.Image | str | Path) -> Encoded:
        """Encode a picture; what CP-attn has in the U-Net is taken out first."""
        image, denoiser = load_picture(picture), cls.network(model)
        backbone = denoiser.backbone
        geometry = fit_geometry(image.size, backbone.sample_size, backbone.multiple, "keep")
        pixels = to_pixels(image, geometry)[None].to(denoiser.device)
        return cls(denoiser, model.model.steps, geometry, backbone.encode(pixels))

    @staticmethod
    def network(model: KVInverter) -> Denoiser:
        """The model's network where it runs, without CP-attn."""
        trainer = model.trainer()
        backbone = model.model.load_backbone(trainer.settle_precision(model.model))
        denoiser = model.model.denoiser
        denoiser.release()
        denoiser.autocast = trainer.precision_plugin.forward_context
        backbone.to(trainer.strategy.root_device)
        return denoiser

    def scene(self, source: str, target: str, guidance: float, steps: int | None = None) -> Scene:
        """What methods are given."""
        network = Network(self.denoiser, (self.z_0.shape[-2], self.z_0.shape[-1]))
        table = self.denoiser.backbone.step_table(self.steps if steps is None else steps)
        return Scene(network, table, self.z_0, source, target, guidance)

    def decode(self, z: Float[Tensor, "1 c h w"]) -> Image.Image:
        """Decode."""
        return to_image(self.denoiser.backbone.decode(z)[0].cpu(), self.geometry)
