"""Action editing on the embedded world, where the true picture of every edit is known.

    python tools/bench_actions.py --cases 64 --seed-base 1000000

prints one row for each way of editing, beside those of the true picture, of another animal of the very same
words in the target action, and of the source as it is:

* in how many pictures it is the same animal, the action is right by the nearest true picture, and right by
  the classifier;
* how much of the second colour is found, and how much of what is found is in its place; in how many the
  accent, the number of marks and the scene are kept; the error of the body's colour;
* PSNR to the true picture, that of the reconstruction to the VAE's round trip, and the time.

Means have their 95 % bootstrap intervals, and `figures.json` in `--work` has every case. Seeds from 1,000,000
up are for reporting; choose settings on 900,000 to 999,999, by `--model`. Interrupted, it resumes where it
was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calling import call
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image
from scoring import Row, table
from true_correspondence import reading_what_corresponds

from kvinv_pl.bench.worker import end_with_parent
from kvinv_pl.data.images.sheet import sheet
from kvinv_pl.menagerie.case import Case
from kvinv_pl.stages.settings import EditSettings
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.trainer import KVTrainer

GUIDING = {"guidance", "source_guidance"}  # tuning has them from the edit where it has none of its own
EDITING = {"slots", *(setting.name for setting in fields(EditSettings))} - GUIDING  # nothing to tuning
Ways = list[dict[str, Any]]


class Bench:
    """Tunes and edits the cases in run folders under `work`, by the command's own module and trainer."""

    def __init__(
        self, cases: list[Case], work: Path, model: dict[str, Any], masks: list[Path] | None = None
    ) -> None:
        self.cases, self.settings, self.work = cases, model, work
        self.sources = work / "sources"
        self.sources.mkdir(parents=True, exist_ok=True)
        rows = []
        for n, case in enumerate(cases):
            file = self.sources / f"{case.animal.seed}.png"
            if not file.exists():
                case.animal.render().save(file)
            rows.append(
                {
                    "image": file.name,
                    "source": case.animal.prompt(),
                    "targets": [case.animal.prompt(case.target)],
                    **({"mask": masks[n].name} if masks else {}),
                }
            )
        kind = "-masked" if masks else ""
        self.list = self.sources / f"{cases[0].animal.seed}-{len(cases)}{kind}.jsonl"
        self.list.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def module(self, **settings: Any) -> KVInversion:
        """The module with the bench's settings and these on top."""
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_lightning_class_args(KVInversion, "model")
        # no retries: some rows are untuned on purpose
        config = parser.parse_object({"model": {"retries": 0, **self.settings, **settings}})
        return parser.instantiate(config)["model"]

    def data(self, model: KVInversion, tuning: dict[str, Any]) -> SourceImages:
        """The cases, in run folders that belong to these tuning settings."""
        ours = {key: value for key, value in self.settings.items() if key not in EDITING}
        key = json.dumps({**ours, **tuning}, sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()[:8]
        return SourceImages(str(self.list), out=str(self.work / name))

    def rows(self, label: str, tuning: dict[str, Any], edits: list[dict[str, Any]]) -> list[Row]:
        """Tune all cases with these settings, and edit them in each of these ways."""
        model = self.module(**tuning)
        data = self.data(model, tuning)
        began = time.perf_counter()
        KVTrainer(logger=False, quiet=True).fit(model, datamodule=data)
        self._note_seconds(data, time.perf_counter() - began)
        seconds = sum(json.loads((work.store.folder / "seconds.json").read_text()) for work in data.images)
        quality = [work.store.read_run()["reconstruction"]["psnr_to_round_trip"] for work in data.images]
        rows = []
        for ways in edits:
            name = ", ".join([label, *(f"{name} {value}" for name, value in ways.items())])
            if "auto" in ways.values():
                rows.append(Row(name, self.chosen(tuning, ways)))
                continue
            edit_settings = replace(model.editing, **ways)
            wanted = edit_settings.record()
            missing = [work for work in data.images if not _edits(work, wanted)]
            if missing:
                KVTrainer(logger=False, quiet=True).edit(model, data.only(missing), edit_settings)
            found = [_edits(work, wanted)[-1] for work in data.images]
            took = float(np.mean([record["figures"]["seconds"] for record, _ in found]))
            pictures = [Image.open(file).convert("RGB") for _, file in found]
            extra = {"reconstruction dB": quality, "tune s": seconds / len(self.cases), "edit s": took}
            rows.append(Row(name, pictures, extra))
        first = data.images[0].store.step(0)
        self.values_of_psi = sum(value.numel() for value in first.psi.values())
        return rows

    def chosen(self, tuning: dict[str, Any], searching: dict[str, Any]) -> list[Image.Image]:
        """The edits that the search takes, without the truth, where these settings are auto."""
        model = self.module(**tuning, **searching)
        data, pictures = self.data(model, tuning), []
        for work in data.images:
            KVTrainer(logger=False, quiet=True).edit(model, data.only([work]))
            pictures.append(Image.open(model.last_edits[0]).convert("RGB"))
        return pictures

    def with_true_correspondence(self, label: str) -> Row:
        """Edit what `rows` has tuned, each token reading what its own in the source shows by the drawing."""
        model = self.module()
        tuned = self.data(model, {})
        copy = tuned.out.with_name(f"{tuned.out.name}-corresponding")
        if not copy.exists():
            shutil.copytree(tuned.out, copy, ignore=shutil.ignore_patterns("edits", "logs"))
        data, pictures = SourceImages(str(self.list), out=str(copy)), []
        for case, work in zip(self.cases, data.images, strict=True):
            with reading_what_corresponds(case.animal, [case.target]):
                KVTrainer(logger=False, quiet=True).edit(model, data.only([work]))
            pictures.append(Image.open(work.store.edits()[-1][1]).convert("RGB"))
        return Row(label, pictures)

    @staticmethod
    def _note_seconds(data: SourceImages, seconds: float) -> None:
        """Save the time of tuning for each case; earlier figures are kept."""
        new = [file for work in data.images if not (file := work.store.folder / "seconds.json").exists()]
        for file in new:
            file.write_text(json.dumps(seconds / len(new)))

    def through_vae(self, draw: Callable[[Case], Image.Image], name: str) -> Row:
        """Pictures that are only encoded and decoded."""
        from kvinv_pl.data.images.geometry import Geometry, to_image, to_pixels

        backbone = self.module().load_backbone(torch.float32)
        pictures = []
        for case in self.cases:
            picture = draw(case)
            geometry = Geometry(picture.size, picture.size)
            z = backbone.encode(to_pixels(picture, geometry)[None])
            pictures.append(to_image(backbone.decode(z)[0], geometry))
        return Row(name, pictures)


def in_processes(
    workers: int, seed_base: int, cases: int, share: Callable[..., None], *arguments: Any
) -> None:
    """Call share(seeds, *arguments) in processes of one thread each, every one with a part of the seeds."""
    each = -(-cases // workers)
    seeds = range(seed_base, seed_base + cases)
    with ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent) as pool:
        parts = [seeds[n : n + each] for n in range(0, cases, each)]
        for task in [pool.submit(_quietly, share, part, *arguments) for part in parts]:
            task.result()


def _quietly(share: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        share(*arguments)


def _edits(work: Any, wanted: dict[str, Any]) -> list[tuple[dict[str, Any], Path]]:
    return [
        (record, file)
        for record, file in work.store.edits()
        if all(record.get(setting.name) == wanted.get(setting.name) for setting in fields(EditSettings))
    ]


def edited(run: Bench, ways: Ways, untuned: bool) -> list[Row]:
    """The rows of every way of editing."""
    never = {"tolerance": float("inf")}  # every phase has converged before it begins: psi stays the identity
    rows: list[Row] = []
    if untuned:
        rows += run.rows("plain DDIM edit", never, [{"reading": "blend", "start": 1.0}])
        rows += run.rows("nothing learned", never, [{}])
    return rows + run.rows("KV Inversion", {}, ways)


def bench(
    cases: int = 64,
    seed_base: int = 1_000_000,
    work: Path = Path("work_bench"),
    edits: str = "[{}]",
    slots: int = 16,
    model: str = "{}",
    untuned: bool = True,
    sheets: int = 24,
    workers: int = 1,
    correspondence: bool = False,
) -> None:
    """Print the table and write sheets of the first cases.

    Args:
        cases: How many.
        seed_base: The first seed.
        work: Where run folders and sheets lie; existing results are reused.
        edits: Ways to edit what was tuned, a JSON list of settings of an edit each; {} are those of --model,
            and with {"start": "auto"} and the like the package's own search chooses, without the truth.
        slots: Cases tuned side by side.
        model: Settings of KVInversion, as JSON.
        untuned: Also edit by plain DDIM, and with what nothing was learned from.
        sheets: How many cases to show.
        workers: Processes of one thread each that share the cases; times are then those of one thread.
        correspondence: Also edit with the true correspondence of edit and source: a bound of all matching.
    """
    settings, ways = {"slots": slots, **json.loads(model)}, json.loads(edits)
    if workers > 1:
        in_processes(workers, seed_base, cases, _share, work, settings, ways, untuned)
    drawn = [Case.of_seed(seed) for seed in range(seed_base, seed_base + cases)]
    run = Bench(drawn, work, settings)
    rows = [
        run.through_vae(lambda case: case.animal.render(case.target), "truth through the VAE"),
        run.through_vae(lambda case: case.animal.another(True).render(case.target), "another animal"),
        run.through_vae(lambda case: case.animal.render(), "the source"),
        *edited(run, ways, untuned),
    ]
    if correspondence:
        rows.append(run.with_true_correspondence("KV Inversion, true correspondence"))
    figures = {row.name: row.figures(drawn) for row in rows}
    print(table(figures))
    (work / "figures.json").write_text(
        json.dumps({name: {k: v.tolist() for k, v in row.items()} for name, row in figures.items()})
    )
    shown = [row for row in rows if "DDIM" in row.name or "KV Inversion" in row.name]
    folder = work / "sheets"
    folder.mkdir(exist_ok=True)
    for n, case in enumerate(drawn[:sheets]):
        pictures = [
            case.animal.render(),
            case.animal.render(case.target),
            *[row.pictures[n] for row in shown],
        ]
        captions = [
            "source: " + case.animal.action,
            "truth: " + case.target,
            *[row.name for row in shown],
        ]
        sheet(pictures, captions).save(folder / f"{case.animal.seed}.png")
    print(f"sheets in {folder}")


def _share(seeds: range, work: Path, settings: dict[str, Any], ways: Ways, untuned: bool) -> None:
    """One worker's share: the table is made from its files."""
    edited(Bench([Case.of_seed(seed) for seed in seeds], work, settings), ways, untuned)


if __name__ == "__main__":
    call(bench)
