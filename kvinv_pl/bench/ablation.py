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
from kvinv_pl.bench.benchmarks.cases import Case, Cases, figures_of
from kvinv_pl.bench.records import slug
from kvinv_pl.bench.tables.table import Report
from kvinv_pl.data.images.geometry import as_pixels, psnr
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.images.sheet import sheet
from kvinv_pl.data.runs.files import write_atomically, write_png
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.errors import SomeFailedError, StopError, UserError
from kvinv_pl.models.checkpoint import outline
from kvinv_pl.stages.editing.strip import Strip
from kvinv_pl.stages.progress import Progress
from kvinv_pl.stages.settings import IDLE, EditSettings
from kvinv_pl.training.datamodule import SourceImages

PLACES = ("encoder", "middle", "decoder", "all", "masactrl")
"""The self-attentions that are tuned; masactrl: the six of Stable Diffusion that MasaCtrl takes over."""
LIKENESS = "likeness to the source dB"
SHOWN_STEPS = 10  # of a strip


@dataclass(frozen=True)
class Way:
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
    _lost: dict[str, dict[str, str]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Refuse places that there are not."""
        for place in self.places:
            if place not in PLACES:
                raise UserError(f"place: expected {', '.join(PLACES)}, got {place!r}")

    @property
    def ways(self) -> list[Way]:
        """The grid; only the reading frozen has a sharpness."""
        grid = itertools.product(self.places, self.readings, self.sharpness, self.starts)
        return [Way(*cell) for cell in grid if cell[1] == "frozen" or cell[2] == 1]

    def run(self) -> None:
        """Tune and edit."""
        if advice := self.setup.advice:
            self.progress.note(advice)
        for place in self.places:
            model = self.setup.load({"retries": 0, "target_modules": self._modules(place)})
            works = self._tuned(place, model)
            for way in self.ways:
                if way.place == place:
                    self._edit(way, model, works)

    def _modules(self, place: str) -> str | list[str]:
        """The self-attentions, as `target_modules` has them."""
        if place != "masactrl":
            return place
        unet, sizes, _ = outline(self.setup.checkpoint)
        grid = (sizes.sample[0] // sizes.vae_factor, sizes.sample[1] // sizes.vae_factor)
        paths = [site.path for site in self_attentions(unet, grid)]
        return paths[round(len(paths) * 10 / 16) :]

    def _tuned(self, place: str, model: KVInverter) -> SourceImages:
        """The run folders of a place, tuned as far as they are not."""
        data = SourceImages(str(self._list()), out=str(self.folder / "runs" / place))
        self.progress.note(f"{place}: {len(data.images)} cases")
        try:
            model.trainer().fit(model.model, datamodule=data)
        except SomeFailedError as error:
            self.progress.note(f"{place}: {error}")
        return data

    def _list(self) -> Path:
        """The cases as a list of pictures, whose run folders have their names."""
        rows = []
        for case in self.data.cases:
            file = self.folder / "sources" / f"{slug(case.name)}.png"
            if not file.exists():
                write_png(file, case.picture())
            rows.append({"image": file.name, "source": case.source, "targets": [case.target]})
        listed = self.folder / "sources" / "cases.jsonl"
        write_atomically(listed, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return listed

    def _edit(self, way: Way, model: KVInverter, data: SourceImages) -> None:
        """Render one cell, and note where its pictures are."""
        settings = replace(model.model.editing, **way.settings)
        missing = [work for work in data.images if _edited(work, settings) is None]
        lost = self._lost.setdefault(str(way), {})
        for work in missing:
            try:
                model.trainer().edit(model.model, data.only([work]), settings)
            except StopError:
                raise
            except UserError as error:
                lost[self._case(work).name] = str(error)
        for work in data.images:
            if (file := _edited(work, settings)) is not None:
                self._files[str(way), self._case(work).name] = file

    def _case(self, work: SourceImage) -> Case:
        return next(case for case in self.data.cases if slug(case.name) == work.store.folder.name)

    def open(self, way: str, case: str) -> Image.Image:
        """A cell's picture of a case."""
        return open_picture(self._files[way, case]).image

    def report(self) -> Report:
        """The figures of every cell."""
        rows: dict[str, dict[str, Mapping[str, float]]] = {}
        unmeasured: dict[str, dict[str, Mapping[str, str]]] = {}
        for way in map(str, self.ways):
            scores = rows.setdefault(way, {})
            for case in self.data.cases:
                if (way, case.name) not in self._files:
                    continue
                picture = self.open(way, case.name)
                figures, lost = figures_of(self.data.metrics, case, lambda: picture)  # noqa: B023
                unmeasured.setdefault(way, {})[case.name] = lost
                figures[LIKENESS] = psnr(as_pixels(case.picture()), as_pixels(picture))
                scores[case.name] = figures
        columns = [*(name for metric in self.data.metrics for name in metric.columns), LIKENESS]
        kinds = {case.name: case.kind for case in self.data.cases}
        return Report(dict(rows), columns, kinds, None, self._lost, unmeasured)

    def grids(self, shown: int) -> Iterator[Path]:
        """The pictures of the first cases as in Fig. 6: places downward, starts to the right."""
        for case in self.data.cases[:shown]:
            for reading, sharpness in itertools.product(self.readings, self.sharpness):
                ways = [way for way in self.ways if (way.reading, way.sharpness) == (reading, sharpness)]
                pictures, captions = list[Image.Image](), list[str]()
                for place in self.places if ways else ():
                    pictures.append(case.picture())
                    captions.append(f"{place}\nsource: {case.source}")
                    for way in ways:
                        if way.place == place:
                            known = (str(way), case.name) in self._files
                            blank = Image.new("RGB", pictures[0].size, "white")
                            pictures.append(self.open(str(way), case.name) if known else blank)
                            captions.append(f"start {way.start:g}" if known else "failed")
                if pictures:
                    name = f"{slug(case.name)}-{reading}-{sharpness:g}.png"
                    yield write_png(
                        self.folder / "grids" / name, sheet(pictures, captions, len(self.starts) + 1)
                    )

    def strips(self, shown: int) -> Iterator[Path]:
        """The predicted x_0 on the way (Fig. 3), from every start: of the decoder and the first reading."""
        place = "decoder" if "decoder" in self.places else self.places[0]
        model = self.setup.load({"retries": 0, "target_modules": self._modules(place)})
        data = SourceImages(str(self._list()), out=str(self.folder / "runs" / place))
        for work in data.images[:shown]:
            pictures, captions = list[Image.Image](), list[str]()
            if not work.store.has_run() or "reconstruction" not in work.store.read_run():
                continue
            for start in self.starts:
                strip = Strip(lambda: model.model.denoiser, work.store, SHOWN_STEPS)
                Run(model, work.store.folder).edits(
                    work.targets[:1], after_step=strip.see, reading=self.readings[0], start=start
                )
                pictures += [picture for _, picture in strip.pictures]
                captions += [f"start {start:g}\nt = {t}" for t, _ in strip.pictures]
            name = f"{work.store.folder.name}.png"
            yield write_png(
                self.folder / "strips" / name, sheet(pictures, captions, len(pictures) // len(self.starts))
            )


def _edited(work: SourceImage, settings: EditSettings) -> Path | None:
    """The picture of an edit with these settings, if it is there."""
    wanted = settings.record()
    keys = {*wanted, *IDLE}
    found = [
        file
        for record, file in work.store.edits()
        if all(record.get(key) == wanted.get(key) for key in keys) and record["target"] in work.targets
    ]
    return found[-1] if found else None
