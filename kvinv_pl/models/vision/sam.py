"""Segment Anything: a mask of the object at points or in a box, or of the most prominent one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, Sam2Model, Sam2Processor, SamModel, SamProcessor

from kvinv_pl import menagerie
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.finite import require_finite
from kvinv_pl.models.checkpoints.loading import find_checkpoint, first_line, load_pretrained, quiet, try_read

KINDS = {"sam": (SamModel, SamProcessor), "sam2": (Sam2Model, Sam2Processor)}
KINDS["sam2_video"] = KINDS["sam2"]  # how SAM 2 is published; only its image part is used
NEEDED = "kvinv takes SAM or SAM 2 as transformers saves them (facebook/sam-vit-base, for one), or menagerie"
PROMPTS = ("input_points", "input_labels", "input_boxes")
GRID, AT_ONCE = 8, 16  # points a side that are tried without a prompt, and how many at a time
MIDDLE = 0.25  # of a picture: the standard deviation, in shares of its sides
Point = tuple[float, float]
Box = tuple[float, float, float, float]


class Segmenter:
    """A frozen SAM or SAM 2 and its processor."""

    def __init__(self, model: SamModel | Sam2Model, processor: SamProcessor | Sam2Processor) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor: Any = processor  # the two kinds take the same arguments, in the same order

    @classmethod
    def load(cls, checkpoint: str = "menagerie", device: str | torch.device = "cpu") -> Segmenter:
        """Load a folder as transformers saves it, a hub id (owner/name), or "menagerie", the embedded one."""
        where = str(find_checkpoint(checkpoint, menagerie.segmenter, NEEDED) or checkpoint)
        with quiet(bars=not Path(where).is_dir()):
            model_class, processor_class = _kind(checkpoint, where)
            model = load_pretrained(model_class, where, dtype=torch.float32)
            processor = try_read(Path(checkpoint), lambda: processor_class.from_pretrained(where))
        return cls(model.to(device), processor)

    @torch.inference_mode()
    def segment(
        self, image: Image.Image, points: Sequence[Point] = (), box: Box | None = None
    ) -> Image.Image:
        """The mask of one object: mode "L", 255 on it, 0 elsewhere, in the picture's size; it may be empty.

        Args:
            image: the picture.
            points: on the object, x and y in pixels from the upper left corner.
            box: around it, left, top, right and bottom in pixels. With neither points nor box it is the
                largest, most central object among those that a grid of points finds.
        """
        _check(image.size, points, box)
        prompted = bool(points) or box is not None
        prompts = [list(points)] if prompted else [[point] for point in _grid(image.size)]
        inputs = self._inputs(image, prompts if prompts[0] else None, box)
        # for one point SAM gives three masks, since it may mean a part or the whole
        logits, scores = self._answers(inputs, three=box is None and len(prompts[0]) == 1)
        if not prompted:
            scores = scores * prominence(self._unpadded(logits, inputs) > 0)
        best = logits[scores.argmax()]
        sizes = [inputs[name].cpu() for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
        mask = self.processor.post_process_masks(best[None, None, None].cpu(), *sizes)[0][0, 0]
        return Image.fromarray(mask.to(torch.uint8).mul(255).numpy())

    def _inputs(
        self, image: Image.Image, points_of_each: list[list[Point]] | None, box: Box | None
    ) -> dict[str, Tensor]:
        """The picture and the prompts, in the model's own pixels."""
        prompts: dict[str, Any] = {}
        if points_of_each is not None:
            prompts["input_points"] = [
                [[list(map(float, point)) for point in points] for points in points_of_each]
            ]
            prompts["input_labels"] = [[[1] * len(points) for points in points_of_each]]
        if box is not None:
            prompts["input_boxes"] = [[list(map(float, box))]]
        inputs = self.processor(images=image.convert("RGB"), return_tensors="pt", **prompts)
        floats = {name: tensor.float() for name, tensor in inputs.items() if tensor.is_floating_point()}
        return {name: tensor.to(self.model.device) for name, tensor in {**inputs, **floats}.items()}

    def _answers(
        self, inputs: Mapping[str, Tensor], three: bool
    ) -> tuple[Float[Tensor, "answers h w"], Float[Tensor, " answers"]]:
        """The logits of all masks, coarse, and the IoU that the model expects of each."""
        embeddings = self.model.get_image_embeddings(inputs["pixel_values"])
        prompts = [(name, inputs[name].split(AT_ONCE, 1)) for name in PROMPTS if name in inputs]
        logits, scores = [], []
        for part in zip(*(parts for _, parts in prompts), strict=True):
            given = {name: tensor for (name, _), tensor in zip(prompts, part, strict=True)}
            out = self.model(image_embeddings=embeddings, multimask_output=three, **given)
            logits.append(out.pred_masks.flatten(0, 2).float())
            scores.append(out.iou_scores.flatten().float())
        return require_finite(torch.cat(logits), "what SAM makes of the picture"), torch.cat(scores)

    def _unpadded(
        self, logits: Float[Tensor, "answers h w"], inputs: Mapping[str, Tensor]
    ) -> Float[Tensor, "answers i j"]:
        """The part of coarse masks that lies over the picture, which SAM (not SAM 2) fills up to a square."""
        if "reshaped_input_sizes" not in inputs:
            return logits
        inside, whole = inputs["reshaped_input_sizes"][0].tolist(), inputs["pixel_values"].shape[-2:]
        h, w = (round(n * part / of) for n, part, of in zip(logits.shape[1:], inside, whole, strict=True))
        return logits[:, : max(1, h), : max(1, w)]


def prominence(masks: Bool[Tensor, "n h w"]) -> Float[Tensor, " n"]:
    """How large and central objects are, 0..1: the share of the picture's middle that each covers.

    What runs along the edge of the picture, as ground and sky do, counts for less.
    """
    h, w = masks.shape[1:]
    y, x = ((torch.arange(n, device=masks.device) + 0.5) / n - 0.5 for n in (h, w))
    middle = torch.exp(-(y[:, None].square() + x.square()) / (2 * MIDDLE**2))
    edge = torch.ones(h, w, device=masks.device)
    edge[1:-1, 1:-1] = 0
    shown = masks.float()
    covered, along = (((shown * weight).sum((1, 2)) / weight.sum()) for weight in (middle, edge))
    return covered * (1 - along).square()


def _grid(size: tuple[int, int]) -> list[Point]:
    """The middles of the cells when a picture is divided into a grid."""
    width, height = size
    return [((i + 0.5) * width / GRID, (j + 0.5) * height / GRID) for j in range(GRID) for i in range(GRID)]


def _check(size: tuple[int, int], points: Sequence[Point], box: Box | None) -> None:
    width, height = size
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(
                f"the point {x:g},{y:g} is outside the picture: expected x from 0 to {width - 1}, "
                f"y from 0 to {height - 1}"
            )
    if box is not None:
        left, top, right, bottom = box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise UserError(
                f"the box {left:g},{top:g},{right:g},{bottom:g} is none in the picture: expected left, top, "
                f"right, bottom, with left < right in 0 to {width} and top < bottom in 0 to {height}"
            )


def _kind(checkpoint: str, where: str) -> tuple[Any, Any]:
    """The classes that read this checkpoint; anything but SAM is refused by its name."""
    if (Path(where) / "model_index.json").is_file():
        raise UserError(f"{checkpoint} is a diffusion model, expected SAM; {NEEDED}")
    try:
        config, _ = PreTrainedConfig.get_config_dict(where)
    except Exception as error:
        found = (
            "cannot be read" if Path(where).is_dir() else "is not a folder, and not available from the hub"
        )
        raise UserError(f"{checkpoint} {found}: {first_line(error)}; {NEEDED}") from error
    kind = config.get("model_type")
    if kind not in KINDS:
        found = f"a model of type {kind!r}" if kind else "no config.json of a model"
        raise UserError(f"{checkpoint} contains {found}, expected SAM; {NEEDED}")
    if kind != "sam" and not find_spec("torchvision"):
        raise UserError(f"{checkpoint} is SAM 2, which needs torchvision: install it, or take a first SAM")
    return KINDS[kind]
