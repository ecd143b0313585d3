"""A bench: every row's edit of every case, computed once, and measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from kvinv_pl import api
from kvinv_pl.algorithm.method import Editor, Renderer
from kvinv_pl.bench.benchmarks.cases import THROUGH_VAE, Case, Cases, error_text, measure
from kvinv_pl.bench.costs import Cost, measure_cost, plain_sampling
from kvinv_pl.bench.records import Records
from kvinv_pl.bench.rows import Row
from kvinv_pl.bench.running import Encoded, apply_method, takes_mask
from kvinv_pl.bench.tables.table import Report
from kvinv_pl.data.images.geometry import as_pixels, psnr
from kvinv_pl.errors import StopError, UserError
from kvinv_pl.stages.progress import Progress

COSTS = ("reconstruction dB", "seconds", "time x", "memory +MiB", "mask given %")
"""What every row is measured by that is computed by a method: the source as it samples it, against the VAE's
round trip; its seconds; these over plain sampling's; memory at its peak, less plain sampling's; and whether
it was given a mask, if it was."""
FEW_STEPS, FEW_TRAILING_STEPS = 35, 20  # docs/evaluation.md, "Number of steps"
"""Below so many, many edits of the drawn world miss the action; the second with trailing spacing."""
PROCESS_ENDED = "its process ended while it was computed"


@dataclass(frozen=True)
class Setup:
    """With what all rows are computed."""

    checkpoint: str = "menagerie"
    steps: int = 50
    guidance: float | None = None
    """Of every target; None: each method's own."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Others of KVInversion."""
    accelerator: str = "auto"
    precision: str = "auto"

    def load(self, more: Mapping[str, Any]) -> api.KVInverter:
        """The model, with a row's own settings."""
        given = {"steps": self.steps, "guidance": self.guidance, **self.settings, **more}
        precision: Any = self.precision
        return api.load(self.checkpoint, accelerator=self.accelerator, precision=precision, **given)

    def check(self, more: Mapping[str, Any]) -> None:
        """Refuse settings that the model does not have or take; its weights are not read."""
        given = {"steps": self.steps, "guidance": self.guidance, **self.settings, **more}
        api.load_module(self.checkpoint, **given)

    @property
    def advice(self) -> str:
        """Of few steps, if they are."""
        trailing = self.settings.get("timestep_spacing") == "trailing"
        if self.steps >= (FEW_TRAILING_STEPS if trailing else FEW_STEPS):
            return ""
        return (
            f"steps {self.steps}: with so few, many edits miss the action: leave --steps at 50, or take "
            f'{FEW_TRAILING_STEPS} and --settings \'{{"timestep_spacing": "trailing"}}\''
        )

    def record(self) -> dict[str, Any]:
        """What pictures depend on."""
        return {
            "checkpoint": self.checkpoint, "steps": self.steps, "guidance": self.guidance,
            "settings": dict(self.settings), "precision": self.precision,
        }  # fmt: skip


@dataclass(eq=False)
class Bench:
    """The rows of one set of cases, with what is known of them on disk."""

    setup: Setup
    data: Cases
    rows: Sequence[Row]
    records: Records
    progress: Progress = field(default_factory=lambda: Progress(counted="case"))
    _model: tuple[Mapping[str, Any], api.KVInverter] | None = field(default=None, init=False)
    _unprepared: dict[str, UserError] = field(default_factory=dict, init=False)
    _plain: dict[tuple[str, tuple[int, int]], Cost] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Refuse a folder of another bench, before anything is computed."""
        models = {metric.name: metric.model for metric in self.data.metrics if metric.model}
        cases = {case.name: case.fingerprint for case in self.data.cases}
        self.records.check_settings({"data": self.data.title, **self.setup.record(), **models})
        self.records.check_cases(cases)
        self.records.add_rows({row.text: row.cases for row in self.rows})

    # ---- computing

    def run(self, part: int = 0, parts: int = 1) -> None:
        """Compute what is missing, and note what fails; every `parts`-th case from the `part`-th on."""
        for name, count, draw in self._every_row():
            cases = self.data.first(count)[part::parts]
            missing = [case for case in cases if not self.records.done(name, case.name)]
            self.progress.begin("bench", name, len(cases))
            self.progress.advance("", len(cases) - len(missing))
            for case in missing:
                self._compute(name, case, draw)
                self.progress.advance(case.name)
            for case in cases:
                self._measure(name, case)
            if missing:
                self.progress.finish()
        for name, count in self._earlier_rows().items():  # a new figure is of every row in the table
            for case in self.data.first(count)[part::parts]:
                self._measure(name, case)

    def _every_row(self) -> Iterator[tuple[str, int | None, Callable[[Case], None]]]:
        """Every row's name, how many cases it has at most, and what computes one."""
        for name, draw in self.data.references.items():
            yield name, None, lambda case, name=name, draw=draw: self._reference(name, case, draw(case))
        for row in self.rows:
            yield row.text, row.cases, lambda case, row=row: self._edit(row, case)

    def _earlier_rows(self) -> dict[str, int | None]:
        """The rows that are in the folder and were not asked for now, as `_every_row` has them."""
        current = {row.text for row in self.rows}
        return {name: count for name, count in self.records.rows().items() if name not in current}

    def _compute(self, name: str, case: Case, draw: Callable[[Case], None]) -> None:
        """Compute one case; whatever a method raises, and the end of its process, is this case's alone."""
        self.records.fail(name, case.name, PROCESS_ENDED)  # what is true if this is the last that is done
        try:
            draw(case)
        except StopError:
            raise
        except Exception as error:
            self.records.fail(name, case.name, error_text(error))

    def _reference(self, name: str, case: Case, picture: Image.Image) -> None:
        if name.endswith(THROUGH_VAE):
            encoded = Encoded.encode(self._load({}), picture)
            picture = encoded.decode(encoded.z_0)
        self.records.save(name, case.name, picture, {})

    def _edit(self, row: Row, case: Case) -> None:
        model, picture = self._load(row.settings), case.picture()
        encoded = Encoded.encode(model, picture)
        trip, plain = encoded.decode(encoded.z_0), self._sampling(row.text, encoded, case.target)
        inversion, editor = row.make_methods()
        sets_guidance = any("guidance" in given for given in (row.settings, *row.options.values()))
        guidance = None if sets_guidance else self.setup.guidance
        mask = None
        if takes_mask(editor) and case.mask is not None:
            mask = Image.fromarray(np.uint8(255) * case.mask.astype(np.uint8))
        self._prepare(row, editor, model)
        with measure_cost(encoded.denoiser.device) as cost:
            result = apply_method(
                model, picture, case.source, case.target, inversion, editor, None, guidance, mask
            )
        metrics = {"seconds": cost.seconds, **cost.relative_to(plain)}
        if mask is not None:
            metrics["mask given %"] = 100.0
        if result.reconstruction is not None:
            metrics["reconstruction dB"] = psnr(as_pixels(result.reconstruction), as_pixels(trip))
        self.records.save(row.text, case.name, result.edited, metrics)

    def _prepare(self, row: Row, editor: Editor | Renderer, model: api.KVInverter) -> None:
        """Have a method load what it needs; what it cannot, it is not asked for again in every case."""
        if (why := self._unprepared.get(row.text)) is not None:
            raise why
        try:
            getattr(editor, "prepare", lambda _: None)(model)
        except UserError as error:
            self._unprepared[row.text] = error
            raise

    def _sampling(self, row: str, encoded: Encoded, target: str) -> Cost:
        """What plain sampling costs, once a row and size, as the load changes."""
        key = (row, encoded.geometry.resized)
        if key not in self._plain:
            w = 7.5 if self.setup.guidance is None else self.setup.guidance
            self._plain[key] = plain_sampling(encoded, target, w)
        return self._plain[key]

    def _load(self, settings: Mapping[str, Any]) -> api.KVInverter:
        """The model with these settings; only the last one is kept."""
        if self._model is None or self._model[0] != settings:
            self._model = None
            self._model = settings, self.setup.load(settings)
        return self._model[1]

    # ---- what is known

    def _measure(self, name: str, case: Case) -> None:
        """Add the figures that are missing of a finished case; whatever a metric raises is noted."""
        if not self.records.done(name, case.name):
            return
        known = self.records.metrics(name, case.name)
        missing = [metric for metric in self.data.metrics if not set(metric.columns) <= known.keys()]
        if missing:
            found, unmeasured = measure(missing, case, lambda: self.records.open(name, case.name))
            self.records.add(name, case.name, found, unmeasured)

    def report(self, ours: str | None = None) -> Report:
        """What is known now; `ours` is the row that the others are compared with.

        Behind the rows that were asked for stand the others of the folder, with what there is of them.
        """
        columns = [*(column for metric in self.data.metrics for column in metric.columns), *COSTS]
        rows, failed, unmeasured = {}, {}, {}
        current, earlier = {name: count for name, count, _ in self._every_row()}, self._earlier_rows()
        for name, count in {**current, **earlier}.items():
            records = {case.name: self.records.read(name, case.name) for case in self.data.first(count)}
            if name in earlier:
                records = {case: record for case, record in records.items() if record is not None}
                if not records:
                    continue
            reasons = {
                case: (record or {}).get("failed", "it was not computed")
                for case, record in records.items()
                if record is None or "failed" in record
            }
            done = [case for case in records if case not in reasons]
            rows[name] = {case: self.records.metrics(name, case) for case in done}
            unmeasured[name] = {case: self.records.unmeasured(name, case) for case in done}
            failed[name] = reasons
        kinds = {case.name: case.kind for case in self.data.cases}
        ours = ours if ours in rows else None
        return Report(
            rows, columns, kinds, ours, failed, unmeasured, [name for name in earlier if name in rows]
        )
