"""Figures of the embedded model against their bars, on animals that it was not trained on.

    python tools/report_menagerie.py --checkpoint kvinv_pl/menagerie/weights

prints the faithfulness of the autoencoder, how well actions are distinguished, the judge's own accuracy, how
well the SAM finds animals, and how often pictures sampled from noise show what their prompts ask for; the
pictures themselves are written to `--out`.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from calling import call
from menagerie_training.judging import ROUND_TRIP_BAR, TRUE_BAR, bytes_of, images
from menagerie_training.pictures import REPORTING_SEED, drawn, psnr, unit
from menagerie_training.segmenting import BOX_BAR, POINT_BAR, own_iou
from PIL import Image

from kvinv_pl import menagerie
from kvinv_pl.data.images.geometry import as_pixels
from kvinv_pl.data.images.sheet import sheet
from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import ACTIONS, Animal
from kvinv_pl.menagerie.classifier import WORDS, Classifier, accuracy, nearest_action
from kvinv_pl.menagerie.identity import identity
from kvinv_pl.models.vision.sam import Segmenter
from kvinv_pl.stages.progress import Progress

FRAME_BAR, ANIMAL_BAR = 30.0, 28.0  # dB of the autoencoder
SAME_BAR, OTHER_BAR = 98.0, 95.0  # percent of verdicts on identity that are right
NEAREST_TRUE_BAR, NEAREST_TRIP_BAR = 99.0, 98.0  # percent of actions named by the nearest true picture
SAMPLED_BARS = {"action": 95.0} | dict.fromkeys(("colour", "coat", "species", "ground"), 90.0)  # percent
COLUMNS = 5  # of a sheet


class Report:
    """Figures, each printed with its bar when it is known."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.missed: list[str] = []

    def add(self, name: str, value: float, unit: str, bar: float | None = None) -> None:
        """Print one figure; with a bar, whether it is met."""
        self.figures[name] = value
        verdict = ""
        if bar is not None:
            verdict = f"   bar {bar:5.1f}   {'met' if value >= bar else 'MISSED'}"
            if value < bar:
                self.missed.append(name)
        print(f"{name:<44}{value:7.2f} {unit:<2}{verdict}", flush=True)


def pages(rows: Sequence[tuple[Sequence[Image.Image], Sequence[str]]]) -> Image.Image:
    """Rows of pictures with captions, one below the other."""
    strips = [sheet(pictures, captions) for pictures, captions in rows]
    page = Image.new(
        "RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white"
    )
    top = 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height
    return page


def groups(count: int, size: int) -> Iterator[range]:
    """The numbers below count, so many at once."""
    return (range(first, min(first + size, count)) for first in range(0, count, size))


def round_trips(report: Report, backbone: Any, judge: Classifier, seeds: range, out: Path) -> None:
    """The autoencoder, the nearest true picture and the judge, on true pictures and round trips."""
    animals, (rgb, mask) = [Animal.sample(seed) for seed in seeds], drawn(seeds, backbone.sample_size[0])
    x = unit(rgb)
    y = torch.cat([backbone.decode(backbone.encode(part)) for part in x.split(50)])
    frame, animal = psnr(x, y), psnr(x, y, mask)
    report.add("round trip, frame", frame.mean().item(), "dB", FRAME_BAR)
    report.add("round trip, animal", animal.mean().item(), "dB", ANIMAL_BAR)
    for coat in WORDS["coat"]:
        rows = [index for index, one in enumerate(animals) if one.coat == coat]
        if rows:
            report.add(f"round trip, animal, {coat}", animal[rows].mean().item(), "dB")
    true, trips = images(rgb), images(bytes_of(y))
    for what, shown, nearest_bar, bar in (
        ("true pictures", true, NEAREST_TRUE_BAR, TRUE_BAR),
        ("round trips", trips, NEAREST_TRIP_BAR, ROUND_TRIP_BAR),
    ):
        right = [
            nearest_action(picture, one) == one.action for picture, one in zip(shown, animals, strict=True)
        ]
        report.add(f"action by nearest true picture, {what}", 100 * sum(right) / len(right), "%", nearest_bar)
        for name, share in accuracy(judge, shown, animals).items():
            report.add(f"judge, {name}, {what}", 100 * share, "%", 100 * bar)
    rows = []
    for group in groups(min(4 * COLUMNS, len(true)), COLUMNS):
        rows.append(([true[index] for index in group], [animals[index].prompt() for index in group]))
        rows.append(
            ([trips[index] for index in group], [f"{animal[index]:.1f} dB on the animal" for index in group])
        )
    pages(rows).save(out / "round_trips.png")


def identified(report: Report, backbone: Any, seeds: range, size: int) -> None:
    """How often the round trip of a true picture is the same animal, and that of another animal is not."""
    animals = [Animal.sample(seed) for seed in seeds]
    others = [animal.another(same_scene=True) for animal in animals]
    for what, shown, same, bar in (
        ("recognised as the same animal, round trips", animals, True, SAME_BAR),
        ("distinguished from another of the same words", others, False, OTHER_BAR),
    ):
        actions = [animal.action for animal in animals]
        x = torch.stack([as_pixels(one.render(a, size)) for one, a in zip(shown, actions, strict=True)])
        trips = images(bytes_of(torch.cat([backbone.decode(backbone.encode(part)) for part in x.split(50)])))
        right = [
            identity(picture, one, one.action).same_animal == same
            for picture, one in zip(trips, animals, strict=True)
        ]
        report.add(what, 100 * sum(right) / len(right), "%", bar)


def segmented(report: Report, folder: Path, seeds: range, size: int) -> None:
    """How well the SAM in the folder, if there is one, finds animals from a point and from a box."""
    if not (folder / "sam" / "config.json").is_file():
        print(f"{folder} has no SAM: its IoU is left out")
        return
    point, box = own_iou(Segmenter.load(str(folder / "sam")), seeds, size)
    report.add("SAM, IoU with the true mask, from a point", 100 * point, "%", 100 * POINT_BAR)
    report.add("SAM, IoU with the true mask, from a box", 100 * box, "%", 100 * BOX_BAR)


def sampled(
    folder: Path, prompts: list[str], first_seed: int, guidance: float, steps: int, batch: int
) -> list[Image.Image]:
    """Pictures from noise by diffusers' own pipeline and DDIM, in fp32; each has a seed of its own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    for library in (transformers_logging, diffusers_logging):
        library.disable_progress_bar()
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    progress, pictures = Progress(), []
    batches = list(groups(len(prompts), batch))
    progress.begin("sampling", f"{len(prompts)} pictures", steps * len(batches))

    def step(_pipeline: Any, _index: int, _t: Any, changed: dict[str, Any]) -> dict[str, Any]:
        progress.advance("steps")
        return changed

    for group in batches:
        pictures += pipeline(
            [prompts[index] for index in group],
            guidance_scale=guidance,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(first_seed + index) for index in group],
            callback_on_step_end=step,
        ).images
    progress.finish()
    return pictures


def prompted_and_seen(
    report: Report, pictures: list[Image.Image], animals: list[Animal], judge: Classifier, out: Path
) -> None:
    """How many samples show what their prompts ask for, by the judge; a sheet with a row for each action."""
    for name, share in accuracy(judge, pictures, animals).items():
        report.add(f"sampled, right {name}", 100 * share, "%", SAMPLED_BARS[name])
    named = judge.names(pictures)
    captions = []
    for animal, words in zip(animals, named, strict=True):
        wrong = [word for name, word in words.items() if word != getattr(animal, name)]
        captions.append(animal.prompt() + (f"\njudge: {', '.join(wrong)}" if wrong else ""))
    rows = []
    for action in ACTIONS:
        chosen = [index for index, animal in enumerate(animals) if animal.action == action][:COLUMNS]
        if chosen:
            rows.append(([pictures[index] for index in chosen], [captions[index] for index in chosen]))
    pages(rows).save(out / "samples.png")


def report(
    checkpoint: str = "menagerie",
    seed_base: int = REPORTING_SEED,
    cases: int = 200,
    samples: int = 200,
    guidance: float = 5.0,
    steps: int = 50,
    batch: int = 50,
    out: Path = Path("runs/report_menagerie"),
) -> None:
    """Print what a menagerie checkpoint can do against its bars, and write sheets of pictures.

    Args:
        checkpoint: an exported folder, or menagerie for the embedded one
        seed_base: first seed of the animals; 1,000,000 and up are for reporting
        cases: animals for the autoencoder, the judges and the SAM
        samples: pictures sampled from noise; 0 leaves them out
        guidance: classifier-free guidance scale of the samples
        steps: DDIM steps of the samples
        batch: samples at once
        out: folder of round_trips.png, samples.png and report.json
    """
    from kvinv_pl.models.stable_diffusion import Backbone

    for name, value, least in (("cases", cases, 1), ("samples", samples, 0), ("batch", batch, 1)):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    backbone = Backbone.load(checkpoint)
    folder = menagerie.checkpoint() if checkpoint == "menagerie" else Path(checkpoint)
    judge, result = Classifier.load(folder), Report()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{folder}: seeds from {seed_base}, {cases} cases, {samples} samples at guidance {guidance}")
    with torch.inference_mode():
        seeds = range(seed_base, seed_base + cases)
        round_trips(result, backbone, judge, seeds, out)
        identified(result, backbone, seeds, backbone.sample_size[0])
        segmented(result, folder, seeds, backbone.sample_size[0])
        if samples:
            animals = [Animal.sample(seed) for seed in range(seed_base, seed_base + samples)]
            prompts = [animal.prompt() for animal in animals]
            pictures = sampled(folder, prompts, seed_base, guidance, steps, batch)
            prompted_and_seen(result, pictures, animals, judge, out)
    (out / "report.json").write_text(json.dumps(result.figures, indent=2) + "\n", encoding="utf-8")
    print(f"{len(result.missed)} bars are missed" if result.missed else "every bar is met")
    print(f"sheets and report.json are in {out}")


def main(args: list[str] | None = None) -> None:
    """Report."""
    call(report, args)


if __name__ == "__main__":
    main()
