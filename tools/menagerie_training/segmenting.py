"""Stage `sam`: a small Segment Anything model, trained on rendered animals and their true masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SamConfig, SamModel, SamProcessor
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from kvinv_pl.menagerie import Animal
from kvinv_pl.models.vision.sam import Segmenter
from menagerie_training.judging import augmented
from menagerie_training.loop import Stage, Trained
from menagerie_training.pictures import REPORTING_SEED, Rows, pictures, unit

POINT_BAR, BOX_BAR = 0.90, 0.92  # mean IoU with the true mask
PATCH = 4  # pixels a side; the decoder's masks are four times as fine: as fine as the picture
BEHIND = 0.25  # share of the second points that ask for what is behind the animal
JITTER = 3  # pixels by which a side of a box may be off


def build_sam(size: int, width: int, layers: int) -> SamModel:
    """A SamModel of one width throughout; every other layer looks at the whole picture."""
    config: Any = SamConfig(
        vision_config={
            "hidden_size": width, "output_channels": width, "num_hidden_layers": layers,
            "num_attention_heads": 4, "mlp_dim": 3 * width, "image_size": size, "patch_size": PATCH,
            "window_size": 8, "global_attn_indexes": list(range(1, layers, 2)), "use_rel_pos": False,
            "num_pos_feats": width // 2, "initializer_range": 0.02,
        },
        prompt_encoder_config={"hidden_size": width, "image_size": size, "patch_size": PATCH},
        mask_decoder_config={
            "hidden_size": width, "mlp_dim": 4 * width, "num_attention_heads": 4,
            "iou_head_hidden_dim": width,
        },
    )  # fmt: skip
    # the fused kernel's backward is the slower one on a CPU; what is saved does not depend on it
    model = SamModel._from_config(config, attn_implementation="eager")
    with torch.no_grad():  # transformers' own start is so fine that neighbours would have nothing in common
        model.shared_image_embedding.positional_embedding.normal_()
    return model


def build_processor(size: int) -> SamProcessor:
    """Pictures of any size to `size` pixels on the longer side, in -1..1."""
    square, longest = {"height": size, "width": size}, {"longest_edge": size}
    images = SamImageProcessorPil(
        size=cast(Any, longest), pad_size=cast(Any, square), mask_size=longest, mask_pad_size=square,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return SamProcessor(images)


def points_on(area: Tensor, count: int) -> Tensor:
    """Random pixels (n, count, 2), as x and y, where area (n, 1, h, w) is 1."""
    flat = torch.multinomial(area.flatten(1).float() + 1e-9, count, replacement=True)
    return torch.stack([flat % area.shape[-1], flat // area.shape[-1]], -1).float()


def boxes_of(mask: Tensor) -> Tensor:
    """The tight boxes (n, 4) of masks (n, 1, h, w), none empty: x0, y0, x1, y1, with their last pixels."""
    edges = []
    for axis in (-2, -1):
        inside = mask[:, 0].amax(axis).int()
        edges.append((inside.argmax(1), inside.shape[1] - 1 - inside.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = edges
    return torch.stack([x0, y0, x1, y1], 1).float()


def mask_loss(logits: Tensor, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy, dice and the error of the IoU that the model expects; and the mean IoU itself.

    Args:
        logits: of the masks, (n, prompts, outputs, h, w)
        scores: the IoU that the model expects of each, (n, prompts, outputs)
        target: the true masks, (n, prompts, 1, h, w)
    """
    logits, truth = logits.float(), target.expand_as(logits).float()
    entropy = F.binary_cross_entropy_with_logits(logits, truth)
    soft = logits.sigmoid()
    dice = 1 - (2 * (soft * truth).sum((-2, -1)) + 1) / ((soft + truth).sum((-2, -1)) + 1)
    with torch.no_grad():
        iou = overlap(logits > 0, truth > 0.5)
    return 5 * entropy + dice.mean() + (scores.float() - iou).square().mean(), iou.mean()


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of masks (..., h, w) of truth values; of two empty ones 0."""
    return (a & b).sum((-2, -1)) / (a | b).sum((-2, -1)).clamp_min(1)


class SAMTraining(Trained):
    """Prompts each picture twice with one point, for three answers, and once with more, for one."""

    def __init__(self, sam: SamModel, lr: float, steps: int) -> None:
        super().__init__(lr, steps, 0.998, sam=sam)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """One batch of pictures and masks, uint8."""
        rgb, mask = batch
        mirrored = torch.rand(len(rgb), 1, 1, 1, device=rgb.device) < 0.5
        x = augmented(unit(torch.where(mirrored, rgb.flip(-1), rgb)))
        mask = torch.where(mirrored, mask.flip(-1), mask)
        sam = cast(SamModel, self.nets["sam"])
        embeddings = sam.vision_encoder(x).last_hidden_state

        behind = torch.rand(len(rgb), 1, 1, 1, device=rgb.device) < BEHIND
        area = torch.where(behind, 1 - mask, mask)
        points = torch.stack([points_on(mask, 1), points_on(area, 1)], 1)
        out = sam(image_embeddings=embeddings, input_points=points, multimask_output=True)
        point_loss, point_iou = mask_loss(out.pred_masks, out.iou_scores, torch.stack([mask, area], 1))
        out = sam(image_embeddings=embeddings, multimask_output=False, **prompts(mask))
        box_loss, box_iou = mask_loss(out.pred_masks, out.iou_scores, mask[:, None])
        loss = point_loss + box_loss
        self.log_dict({"sam/loss": loss, "sam/point": point_iou, "sam/box": box_iou}, prog_bar=True)
        return loss


def prompts(mask: Tensor) -> dict[str, Any]:
    """The prompts of a batch: a box, three points or both; the third point may lie beside the animal."""
    given: dict[str, Any] = {}
    with_box, with_points = ((True, False), (False, True), (True, True))[int(torch.randint(3, ()))]
    if with_box:  # from exact to drawn by hand
        off = JITTER * torch.rand(len(mask), 1, device=mask.device)
        box = boxes_of(mask)
        given["input_boxes"] = (box + off * (2 * torch.rand_like(box) - 1))[:, None]
    if with_points:
        on = torch.rand(len(mask), device=mask.device) < 0.5
        third = points_on(torch.where(on.view(-1, 1, 1, 1), mask, 1 - mask), 1)
        labels = torch.stack([torch.ones_like(on), torch.ones_like(on), on], 1).float()
        given["input_points"] = torch.cat([points_on(mask, 2), third], 1)[:, None]
        given["input_labels"] = labels[:, None]
    return given


def own_iou(segmenter: Segmenter, seeds: range, size: int) -> tuple[float, float]:
    """Mean IoU with the true masks of these seeds: from a random point on the animal, and from its box."""
    ious = []
    for seed in seeds:
        animal = Animal.sample(seed)
        picture, true = animal.render(size=size), torch.from_numpy(np.array(animal.mask(size=size)))
        rows, columns = torch.nonzero(true, as_tuple=True)
        chosen = int(np.random.default_rng(seed).integers(len(rows)))
        x0, y0, x1, y1 = boxes_of(true[None, None].byte())[0].tolist()
        answers = (
            segmenter.segment(picture, points=[(int(columns[chosen]), int(rows[chosen]))]),
            segmenter.segment(picture, box=(x0, y0, x1, y1)),
        )
        ious.append([overlap(torch.from_numpy(np.array(answer)) > 127, true) for answer in answers])
    point, box = torch.tensor(ious).mean(0).tolist()
    return point, box


def train(
    work: Path, count: int, size: int, width: int, layers: int, steps: int, batch: int, lr: float, cases: int
) -> None:
    """Train the model; its averaged weights and processor come to `work`/sam-trained, its IoU is printed."""
    settings = {
        "count": count, "size": size, "width": width, "layers": layers,
        "steps": steps, "batch": batch, "lr": lr,
    }  # fmt: skip
    stage = Stage(work, "sam", settings, ["sam-trained/model.safetensors"])
    trained = work / "sam-trained"
    if not stage.finished():
        L.seed_everything(0, verbose=False)
        rgb, mask = pictures(work, count, size)
        module = SAMTraining(build_sam(size, width, layers), lr, steps)
        stage.fit(module, Rows(rgb, mask), batch)
        cast(SamModel, module.average["sam"]).save_pretrained(trained)
        build_processor(size).save_pretrained(trained)
        stage.finish()
    segmenter = Segmenter.load(str(trained))
    figures = own_iou(segmenter, range(REPORTING_SEED, REPORTING_SEED + cases), size)
    for what, iou, bar in zip(("a point", "a box"), figures, (POINT_BAR, BOX_BAR), strict=True):
        verdict = "met" if iou >= bar else "MISSED"
        print(f"sam, {cases} animals, from {what}: IoU {iou:.3f}  (bar {bar}: {verdict})", flush=True)
