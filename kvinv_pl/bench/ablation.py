"""The paper's ablation (Fig. 6) and more: where CP-attn is, from when on, and how an edit reads it."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from kvinv_pl.api import KVInverter, Run
from kvinv_pl.attention.sites import self_attentions
from kvinv_pl.bench.bench import Setup
from kvinv_pl.bench.benchmarks.cases import Cases, measure
from kvinv_pl.bench.records import slug
from kvinv_pl.bench.tables.table import Report
from kvinv_pl.data.images.geometry import as_pixels, psnr
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.images.sheet import sheet
from kvinv_pl.data.runs.files import write_atomically, write_png
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.errors import SomeFailedError, StopError, UserError
from kvinv_pl.models.checkpoint import load_on_meta
from kvinv_pl.stages.editing.predicted_x0 import Strip
from kvinv_pl.stages.progress import Progress
from kvinv_pl.stages.settings import IDLE, EditSettings
from kvinv_pl.training.datamodule import SourceImages

PLACES = ("encoder", "middle", "decoder", "all", "masactrl")
"""The self-attentions that are tuned; masactrl: the six of Stable Diffusion that MasaCtrl takes over."""
LIKENESS = "likeness to the source dB"
SHOWN_STEPS = 10  # of a strip


@dataclass(frozen=True)
class Cell:
    """One cell of the grid."""

    place: str
    reading: str
    sharpness: float
    start: float

    def __str__(self) -> str:
        """As in tables."""
        sharp = f", sharpness {self.sharpness:g}" if self.sharpness != 1 else ""
        return f"{self.place}, {self.reading}{sharp}, start {self.start:g}"

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the edit."""
        return {"reading": self.reading, "sharpness": self.sharpness, "start": self.start}


@dataclass(eq=False)
class Ablation:
    """Every case tuned once for each place, and edited in every way; what is on disk is not made again."""

    setup: Setup
    data: Cases
    folder: Path
    places: Sequence[str] = PLACES
    readings: Sequence[str] = ("frozen", "blend")
    sharpness: Sequence[float] = (1.0,)
    starts: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9)
    progress: Progress = field(default_factory=Progress)
    _files: dict[tuple[str, str], Path] = field(default_factory=dict, init=False)
    _failed: dict[str, dict[str, str]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Refuse places that there are not."""
        for place in self.places:
            if place not in PLACES:
                raise UserError(f"place: expected {', '.join(PLACES)}, got {place!r}")

    @property
    def cells(self) -> list[Cell]:
        """The grid; only the reading frozen has a sharpness."""
        grid = itertools.product(self.places, self.readings, self.sharpness, self.starts)
        return [Cell(*cell) for cell in grid if cell[1] == "frozen" or cell[2] == 1]

    def run(self) -> None:
        """Tune and edit."""
        if advice := self.setup.advice:
            self.progress.note(advice)
        for place in self.places:
            model, data = self._load(place), self._source_images(place)
            self.progress.note(f"{place}: {len(data.images)} cases")
            try:
                model.trainer().fit(model.model, datamodule=data)
            except SomeFailedError as error:
                self.progress.note(f"{place}: {error}")
            for cell in self.cells:
                if cell.place == place:
                    self._edit(cell, model, data)

    def _load(self, place: str) -> KVInverter:
        """The model with CP-attn at a place."""
        modules: str | list[str] = place
        if place == "masactrl":
            unet, sizes, _ = load_on_meta(self.setup.checkpoint)
            grid = (sizes.sample[0] // sizes.vae_factor, sizes.sample[1] // sizes.vae_factor)
            paths = [site.path for site in self_attentions(unet, grid)]
            modules = paths[round(len(paths) * 10 / 16) :]
        return self.setup.load({"retries": 0, "target_modules": modules})

    def _source_images(self, place: str) -> SourceImages:
        """The cases as a list of pictures, whose run folders have their names."""
        rows, folder = [], self.folder / "sources"
        for case in self.data.cases:
            file = folder / f"{slug(case.name)}.png"
            if not file.exists():
                write_png(file, case.picture())
            rows.append({"image": file.name, "source": case.source, "targets": [case.target]})
        write_atomically(folder / "cases.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        return SourceImages(str(folder / "cases.jsonl"), out=str(self.folder / "runs" / place))

    def _edit(self, cell: Cell, model: KVInverter, data: SourceImages) -> None:
        """Render one cell, and note where its pictures are."""
        settings, cases = replace(model.model.editing, **cell.settings), self.data.cases
        names = {slug(case.name): case.name for case in cases}
        failed = self._failed.setdefault(str(cell), {})
        for image in data.images:
            name = names[image.store.folder.name]
            try:
                if _find_edit(image, settings) is None:
                    model.trainer().edit(model.model, data.only([image]), settings)
            except StopError:
                raise
            except UserError as error:
                failed[name] = str(error)
            if (file := _find_edit(image, settings)) is not None:
                self._files[str(cell), name] = file

    def open(self, cell: str, case: str) -> Image.Image:
        """A cell's picture of a case."""
        return open_picture(self._files[cell, case]).image

    def report(self) -> Report:
        """The figures of every cell."""
        rows: dict[str, dict[str, Mapping[str, float]]] = {}
        unmeasured: dict[str, dict[str, Mapping[str, str]]] = {}
        for cell in map(str, self.cells):
            rows[cell], unmeasured[cell] = {}, {}
            for case in self.data.cases:
                if (cell, case.name) in self._files:
                    picture = self.open(cell, case.name)
                    metrics, unmeasured[cell][case.name] = measure(self.data.metrics, case, picture.copy)
                    metrics[LIKENESS] = psnr(as_pixels(case.picture()), as_pixels(picture))
                    rows[cell][case.name] = metrics
        columns = [*(name for metric in self.data.metrics for name in metric.columns), LIKENESS]
        kinds = {case.name: case.kind for case in self.data.cases}
        return Report(dict(rows), columns, kinds, None, self._failed, unmeasured)

    def grids(self, shown: int) -> Iterator[Path]:
        """The pictures of the first cases as in Fig. 6: places downward, starts to the right."""
        cases = self.data.cases[:shown]
        for case, reading, sharpness in itertools.product(cases, self.readings, self.sharpness):
            cells = [cell for cell in self.cells if (cell.reading, cell.sharpness) == (reading, sharpness)]
            source, pictures, captions = case.picture(), list[Image.Image](), list[str]()
            blank = Image.new("RGB", source.size, "white")
            for place, of_place in itertools.groupby(cells, lambda cell: cell.place):
                pictures.append(source)
                captions.append(f"{place}\nsource: {case.source}")
                for cell in of_place:
                    known = (str(cell), case.name) in self._files
                    pictures.append(self.open(str(cell), case.name) if known else blank)
                    captions.append(f"start {cell.start:g}" if known else "failed")
            if pictures:
                file = self.folder / "grids" / f"{slug(case.name)}-{reading}-{sharpness:g}.png"
                yield write_png(file, sheet(pictures, captions, len(self.starts) + 1))

    def strips(self, shown: int) -> Iterator[Path]:
        """The predicted x_0 on the way (Fig. 3), from every start: of the decoder and the first reading."""
        place = "decoder" if "decoder" in self.places else self.places[0]
        model = self._load(place)
        for image in self._source_images(place).images[:shown]:
            pictures, captions = list[Image.Image](), list[str]()
            if not image.store.has_run() or "reconstruction" not in image.store.read_run():
                continue
            for start in self.starts:
                strip = Strip(lambda: model.model.denoiser, image.store, SHOWN_STEPS)
                Run(model, image.store.folder).edits(
                    image.targets[:1], after_step=strip.see, reading=self.readings[0], start=start
                )
                pictures += [picture for _, picture in strip.pictures]
                captions += [f"start {start:g}\nt = {t}" for t, _ in strip.pictures]
            file = self.folder / "strips" / f"{image.store.folder.name}.png"
            yield write_png(file, sheet(pictures, captions, len(pictures) // len(self.starts)))


def _find_edit(image: SourceImage, settings: EditSettings) -> Path | None:
    """The picture of an edit with these settings, if it is there."""
    wanted = settings.record()
    found = [
        file
        for record, file in image.store.edits()
        if record["target"] in image.targets
        and all(record.get(key) == wanted.get(key) for key in {*wanted, *IDLE})
    ]
    return found[-1] if found else None
