"""Published methods beside KV Inversion on the embedded world, where the true picture of every edit is known.

    python tools/bench_methods.py --cases 64 --seed-base 1000000

prints one row for each pair of an inversion and an edit, in the columns of tools/bench_actions.py, and writes
a sheet of the first cases. The pictures lie in `--work`: interrupted, it resumes where it was. Settings are
chosen on seeds from 900,000 to 999,999; those from 1,000,000 up are for reporting.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_actions import Bench, in_processes
from calling import call
from PIL import Image
from scoring import Case, Row, table

import kvinv_pl
from kvinv_pl.bench.running import run_method
from kvinv_pl.data.files import write_png
from kvinv_pl.data.sheet import sheet

PAIRS = (
    "ddim+plain", "ddim+prompt_to_prompt", "ddim+masactrl", "direct+prompt_to_prompt", "direct+masactrl",
    "negative_prompt+prompt_to_prompt", "edit_friendly+plain", "kv_inversion",
)  # fmt: skip


def render(seeds: range, work: Path, pairs: list[str]) -> None:
    """The edits of these cases by every pair, unless their files are there."""
    model: Any = None
    for pair in pairs:
        for case in map(Case.of_seed, seeds):
            file = work / pair / f"{case.animal.seed}.png"
            if file.exists():
                continue
            model = model or kvinv_pl.load("menagerie", accelerator="cpu")
            inversion, _, editor = pair.rpartition("+")
            prompts = case.animal.prompt(), case.animal.prompt(case.target)
            began = time.perf_counter()
            edited = run_method(
                model, case.animal.render(), *prompts, inversion=inversion or None, editor=editor
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_suffix(".json").write_text(json.dumps({"seconds": time.perf_counter() - began}))
            write_png(file, edited)


def bench(
    cases: int = 64,
    seed_base: int = 1_000_000,
    work: Path = Path("work_methods"),
    pairs: list[str] = list(PAIRS),  # noqa: B006
    workers: int = 1,
) -> None:
    """Print the table and write a sheet of the first 12 cases.

    Args:
        cases: How many.
        seed_base: The first seed.
        work: Where pictures lie; existing ones are reused.
        pairs: INVERSION+EDIT, or the name of a method that is both, as `kvinv methods` lists them.
        workers: Processes of one thread each that share the cases; times are then those of one thread.
    """
    if workers > 1:
        in_processes(workers, seed_base, cases, render, work, pairs)
    seeds = range(seed_base, seed_base + cases)
    render(seeds, work, pairs)
    drawn = [Case.of_seed(seed) for seed in seeds]
    run = Bench(drawn, work, {})
    rows = [
        run.through_vae(lambda case: case.animal.render(case.target), "truth through the VAE"),
        run.through_vae(lambda case: case.animal.another(True).render(case.target), "another animal"),
        run.through_vae(lambda case: case.animal.render(), "the source"),
    ]
    for pair in pairs:
        files = [work / pair / f"{seed}.png" for seed in seeds]
        seconds = [json.loads(file.with_suffix(".json").read_text())["seconds"] for file in files]
        pictures = [Image.open(file).convert("RGB") for file in files]
        rows.append(Row(pair, pictures, {"edit s": float(np.mean(seconds))}))
    print(table({row.name: row.figures(drawn) for row in rows}))
    shown: list[tuple[Image.Image, str]] = []
    for n, case in enumerate(drawn[:12]):
        shown.append((case.animal.render(), "source: " + case.animal.action))
        shown += [(row.pictures[n], row.name) for row in (rows[0], *rows[3:])]
    pictures, captions = zip(*shown, strict=True)
    print(write_png(work / "sheet.png", sheet(list(pictures), list(captions))))


if __name__ == "__main__":
    call(bench)
