"""All that a bench is asked for, as one value that a process can be started with."""

import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from kvinv_pl.bench.bench import Bench, Setup
from kvinv_pl.bench.benchmarks.cases import Cases, drawn_world
from kvinv_pl.bench.benchmarks.edit_bench import edit_bench, is_edit_bench
from kvinv_pl.bench.benchmarks.image_list import image_list
from kvinv_pl.bench.benchmarks.metrics import UNEDITED, clip_score, lpips, structure_distance
from kvinv_pl.bench.benchmarks.pie import is_pie_bench, pie_bench
from kvinv_pl.bench.records import Records
from kvinv_pl.bench.rows import Row
from kvinv_pl.bench.worker import end_with_parent
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoint import load_on_meta
from kvinv_pl.models.costs.limits import cores
from kvinv_pl.stages.progress import Progress

WORLD = "world"
WORLD_CASES = 64


@dataclass(frozen=True)
class Plan:
    """What is compared, on which cases, by which figures."""

    methods: tuple[str, ...]
    out: Path
    setup: Setup
    data: str = WORLD
    cases: int | None = None
    seed_base: int = 1_000_000
    clip: str | None = None
    dino: str | None = None
    lpips: str | None = None
    ours: str | None = None
    """A row that has to be there, as others are compared with it."""

    def bench(self, quiet: bool = False) -> Bench:
        """Everything that can be refused is refused here, before anything is computed."""
        rows = list(dict.fromkeys(self.methods))
        names = [Row.parse(text) for text in rows]
        if twice := {row.text for row in names if [other.text for other in names].count(row.text) > 1}:
            raise UserError(f"{min(twice)} is given twice with different numbers of cases: give it once")
        for given in [{}, *(row.settings for row in names)]:
            self.setup.check(given)
        data, records = self.load_cases(), Records(self.out)
        there = dict.fromkeys([*data.references, *(row.text for row in names), *records.rows()])
        if self.ours is not None and Row.name_of(self.ours) not in there:
            raise UserError(f"ours: expected one of the rows, {'; '.join(there)}, got {self.ours}")
        return Bench(self.setup, data, names, records, Progress(quiet=quiet, counted="case"))

    def load_cases(self) -> Cases:
        """The cases, with the figures that they are measured by."""
        metrics = [UNEDITED]
        metrics += [clip_score(self.clip, self._device)] if self.clip else []
        metrics += [structure_distance(self.dino, self._device)] if self.dino else []
        metrics += [lpips(self.lpips, self._device)] if self.lpips else []
        if self.cases is not None and self.cases < 1:
            raise UserError(f"cases: expected 1 or more, got {self.cases}")
        if self.data == WORLD:
            size = load_on_meta(self.setup.checkpoint)[1].sample
            return drawn_world(size, self.cases or WORLD_CASES, self.seed_base, metrics)
        place = Path(self.data).expanduser()
        if is_pie_bench(place):
            return pie_bench(place, self.cases, metrics)
        if is_edit_bench(place):
            return edit_bench(place, self.cases, metrics)
        return image_list(place, self.cases, metrics)

    @property
    def _advice(self) -> str:
        """Of pictures that the embedded model knows nothing of."""
        if self.data == WORLD or self.setup.checkpoint != "menagerie":
            return ""
        return "the embedded model knows its own drawn animals alone: for photographs, give --checkpoint"

    @property
    def _device(self) -> str:
        return "cuda" if self.setup.accelerator != "cpu" and torch.cuda.is_available() else "cpu"

    def run(self, workers: int = 1) -> Bench:
        """Compute what is missing, in so many processes."""
        if workers < 1:
            raise UserError(f"workers: expected 1 or more, got {workers}")
        bench = self.bench()
        for advice in filter(None, (self.setup.advice, self._advice)):
            bench.progress.note(advice)
        if workers == 1:
            bench.run()
            return bench
        with ExitStack() as pools:  # one each: the end of one process is no end of the others
            tasks = []
            for part in range(workers):
                pool = pools.enter_context(ProcessPoolExecutor(1, get_context("spawn"), end_with_parent))
                tasks.append(pool.submit(_run_share, self, part, workers))
            for part, task in enumerate(tasks, 1):
                try:
                    task.result()
                except BrokenProcessPool:
                    bench.progress.note(f"process {part} of {workers} ended before its cases were done")
        return bench


def _run_share(plan: Plan, part: int, parts: int) -> None:
    """One process's cases: on a GPU of its own as far as there are any, or on its share of the cores."""
    devices = torch.cuda.device_count() if plan.setup.accelerator != "cpu" else 0
    if devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[part % devices]  # nothing is on a device yet
    else:
        torch.set_num_threads(max(1, cores() // parts))
    plan.bench(quiet=part > 0).run(part, parts)
