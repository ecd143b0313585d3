"""Every attention variant on the embedded world, where the true picture of every edit is known.

    python tools/bench_variants.py --cases 64 --seed-base 1000000
    python tools/bench_variants.py --compare masks --cases 24 --seed-base 900200

prints one row for each variant: the columns of bench_actions.py, the background away from the animals and
what part of its error lies near them, the values of psi for one timestep, and times relative to sampling a
picture with the same model, of one picture that is tuned and edited alone. Writes a page of six cases under
all of them.

Masks are those that the embedded SAM finds from one point on the animal; `--compare masks` has the choices of
`masked` for rows. Interrupted, it resumes where it was.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from bench_actions import Bench, in_processes
from calling import call
from PIL import Image, ImageFilter
from scoring import COLUMNS, Row

from kvinv_pl.bench.tables.table import Mean
from kvinv_pl.data.images.sheet import sheet
from kvinv_pl.menagerie.case import Case
from kvinv_pl.models.vision.sam import Segmenter
from kvinv_pl.training.module import KVInversion

PLUGINS = "kvinv_plugins"
FULL, LOW = f"{PLUGINS}.full_kv.FullKV", f"{PLUGINS}.low_rank.LowRank"


def masked(**options: Any) -> dict[str, Any]:
    """Around full_kv."""
    inner = {"inner": {"class_path": FULL}, **options}
    return {"class_path": f"{PLUGINS}.masked.Masked", "init_args": inner}


ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "variants": {
        "no control": {"class_path": FULL},
        "full_kv": {"class_path": FULL},
        "v_only": {"class_path": f"{PLUGINS}.v_only.VOnly"},
        "masked full_kv": masked(),
        "low_rank 1": {"class_path": LOW, "init_args": {"rank": 1}},
        "low_rank 4": {"class_path": LOW, "init_args": {"rank": 4}},
        "low_rank 16": {"class_path": LOW, "init_args": {"rank": 16}},
        "recorded": {"class_path": f"{PLUGINS}.recorded.Recorded"},
    },
    "masks": {
        "full_kv": {"class_path": FULL},
        "masked, source": masked(queries="source"),
        "masked, words": masked(queries="words"),
        "masked, union": masked(queries="union"),
        "masked, agreed": masked(queries="agreed"),
        "masked, agreed, others read all": masked(queries="agreed", separate=False),
    },
}


def found_masks(cases: list[Case], work: Path) -> list[Path]:
    """The masks that SAM finds in the sources from the point of each animal that is nearest to its middle."""
    segmenter, files = Segmenter.load("menagerie"), list[Path]()
    for case in cases:
        file = work / "sources" / f"{case.animal.seed}-mask.png"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.argwhere(np.array(case.animal.mask()))
            y, x = pixels[np.square(pixels - pixels.mean(0)).sum(1).argmin()]
            segmenter.segment(case.animal.render(), [(float(x) + 0.5, float(y) + 0.5)]).save(file)
        files.append(file)
    return files


def near_and_far(case: Case, picture: Image.Image) -> tuple[float, float]:
    """What part of the background's squared error lies near the animals, and the PSNR in dB of the rest.

    Near is within 2 pixels of either animal, or where the true pictures differ: their shadows.
    """
    size = picture.width
    truth, source = case.animal.render(case.target, size), case.animal.render(None, size)
    animals = [case.animal.mask(action, size).convert("L") for action in (case.target, case.animal.action)]
    wider = [mask.filter(ImageFilter.MaxFilter(5)) for mask in animals]
    covered, around = (np.any([np.asarray(m) > 0 for m in masks], axis=0) for masks in (animals, wider))
    moved = np.any(np.asarray(truth, np.int16) != np.asarray(source, np.int16), axis=2)
    error = np.square((np.asarray(picture, np.float64) - np.asarray(truth, np.float64)) / 255).mean(2)
    far = ~(around | moved)
    share = 1 - error[far].sum() / error[~covered].sum()
    return 100 * share, -10 * float(np.log10(error[far].mean() + 1e-10))


def row_of(
    name: str, attention: dict[str, Any], cases: list[Case], work: Path, settings: dict[str, Any]
) -> Row:
    """A variant's row: tuned and edited with these settings of KVInversion, and the defaults."""
    masks = found_masks(cases, work) if "masked" in name else None
    bench = Bench(cases, work, {**settings, "attention": attention}, masks)
    free = name == "no control"
    tuning = {"tolerance": float("inf")} if free else {}
    (row,) = bench.rows(name, tuning, [{"reading": "blend", "start": 1.0} if free else {}])
    psi = {} if free else {"psi": float(bench.values_of_psi)}
    return Row(name, row.pictures, row.extra | psi)


def times_of(
    name: str, attention: dict[str, Any], case: Case, settings: dict[str, Any], rounds: int
) -> tuple[float, float]:
    """Tuning and editing one picture by itself, over sampling just before and after: medians."""
    found = []
    for _ in range(rounds):
        before = seconds_to_sample()
        with TemporaryDirectory() as folder:
            extra = row_of(name, attention, [case], Path(folder), {**settings, "slots": 1}).extra
        sampling = (before + seconds_to_sample()) / 2
        found.append((extra["tune s"] / sampling, extra["edit s"] / sampling))
    tune, edit = np.median(found, axis=0)
    return float(tune), float(edit)


def seconds_to_sample() -> float:
    """What sampling one picture takes with as many steps: one forward of two rows a step."""
    module = KVInversion()
    backbone = module.load_backbone(torch.float32)
    side = backbone.sample_size[0] // backbone.vae_factor
    z, contexts = torch.zeros(2, backbone.latent_channels, side, side), backbone.embed(["", "a cat"])
    taken = []
    for _ in range(20):
        began = time.perf_counter()
        with torch.no_grad():
            backbone.predict(z, torch.full((2,), 500), contexts)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken)) * module.steps


def share(seeds: range, compare: str, work: Path, settings: dict[str, Any]) -> None:
    """One worker's share: the table is made from its files."""
    for name, attention in ROWS[compare].items():
        row_of(name, attention, [Case.of_seed(seed) for seed in seeds], work, settings)


def bench(
    cases: int = 64,
    seed_base: int = 1_000_000,
    compare: Literal["variants", "masks"] = "variants",
    work: Path = Path("work_bench/variants"),
    slots: int = 16,
    model: str = "{}",
    rounds: int = 3,
    workers: int = 1,
) -> None:
    """Print the table and write the page of the first six cases.

    Args:
        cases: How many.
        seed_base: The first seed.
        compare: All variants, or the choices of `masked`.
        work: Where run folders and the page lie; existing results are reused.
        slots: Cases tuned side by side.
        model: Settings of KVInversion, as JSON.
        rounds: How often one picture is tuned and edited to be timed.
        workers: Processes of one thread each that share the cases.
    """
    settings = {"slots": slots, **json.loads(model)}
    if workers > 1:
        in_processes(workers, seed_base, cases, share, compare, work, settings)
    drawn = [Case.of_seed(seed) for seed in range(seed_base, seed_base + cases)]
    torch.set_num_threads(1)
    rows = [row_of(name, attention, drawn, work, settings) for name, attention in ROWS[compare].items()]
    columns = [column for column in COLUMNS if not column.endswith(" s")]
    print("| | " + " | ".join([*columns, "far dB", "near %", "psi", "to tune", "to edit"]) + " |")
    print("|---" * (len(columns) + 6) + "|")
    for row in rows:
        figures = row.figures(drawn)
        cells = [str(Mean.of(figures[column])) for column in columns]
        psi = f"{row.extra['psi']:,.0f}" if "psi" in row.extra else ""
        tune, edit = times_of(row.name, ROWS[compare][row.name], drawn[0], settings, rounds)
        near, far = np.mean([near_and_far(*each) for each in zip(drawn, row.pictures, strict=True)], axis=0)
        cells += [f"{far:.2f}", f"{near:.0f}", psi, f"{tune:.1f} x" if psi else "", f"{edit:.2f} x"]
        print(f"| {row.name} | " + " | ".join(cells) + " |", flush=True)
    pages: list[Image.Image] = []
    for n, case in enumerate(drawn[:6]):
        pictures = [case.animal.render(), case.animal.render(case.target), *[row.pictures[n] for row in rows]]
        captions = [f"source: {case.animal.action}", f"truth: {case.target}", *[row.name for row in rows]]
        pages.append(sheet(pictures, captions))
    page = Image.new("RGB", (max(p.width for p in pages), sum(p.height for p in pages)), "white")
    top = 0
    for each in pages:
        page.paste(each, (0, top))
        top += each.height
    page.save(work / f"{compare}.png")
    print(work / f"{compare}.png")


if __name__ == "__main__":
    call(bench)
