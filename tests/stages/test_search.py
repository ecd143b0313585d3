"""Automatic settings: what is tried, how it is judged, and what is chosen."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import fits
import numpy as np
import pytest
import torch
from commands import kvinv, refused
from PIL import Image, ImageColor

from kvinv_pl.app.reports.report import write_report
from kvinv_pl.data.images.geometry import shared_colours
from kvinv_pl.data.images.sheet import BORDER, MARK, SIDES
from kvinv_pl.data.runs.edits import Edits, search_of
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.stages.editing.judge import Candidate, denoising_agreement, pareto_front, ranked
from kvinv_pl.stages.editing.search import GRIDS, Search
from kvinv_pl.training.datamodule import SourceImages


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fits.finished(tmp_path_factory.mktemp("search") / "run").folder


@pytest.fixture
def run(tuned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tuned, tmp_path / "run"))


def candidate(agreement: float, likeness: float, start: float = 0.0) -> Candidate:
    return Candidate(fits.model(start=start).editing, Path("x.png"), agreement, likeness)


def bordered(file: Path) -> int:
    """How many pictures of a sheet have a border."""
    blue = (np.asarray(fits.opened(file)) == ImageColor.getrgb(MARK)).all(-1)
    rows = blue.sum(1)  # the first line of a border is as long as its picture and both sides
    return int(rows[rows > 2 * BORDER].sum() // (BORDER * 2 * (SIDES[0] + 2 * BORDER)))


def test_of_those_that_do_what_the_target_says_the_earliest_and_most_like_the_source_is_chosen() -> None:
    idle, halfway, done, wild = (
        candidate(*figures) for figures in ((-0.1, 40), (0.02, 30), (0.09, 20), (0.1, 10))
    )
    assert ranked([idle, halfway, done, wild]) == [done, wild, halfway, idle]
    assert ranked([idle, candidate(-0.2, 50)])[0] == idle  # none does: the one that does most of it
    still, late = candidate(0.01, 50, start=0.0), candidate(0.1, 40, start=0.3)
    early, wilder = candidate(0.08, 20, start=0.1), candidate(0.09, 15, start=0.1)
    assert ranked([late, wilder, still, early]) == [early, wilder, late, still]
    assert pareto_front([idle, halfway, done, wild, candidate(0.05, 15)]) == [idle, halfway, done, wild]


def test_colours_are_shared_wherever_they_are() -> None:
    half = Image.new("RGB", (8, 4), (200, 0, 0))
    half.paste((0, 0, 200), (0, 0, 4, 4))
    turned, red = half.rotate(180), Image.new("RGB", (2, 2), (200, 0, 0))
    assert shared_colours(half, turned) == 100 and shared_colours(half, red) == 50
    assert shared_colours(red, Image.new("RGB", (2, 2), (0, 0, 200))) == 0


def test_what_is_auto_is_tried_and_the_rest_is_as_asked() -> None:
    module = fits.model(start="auto", guidance="auto", mixing="concat")
    assert (module.editing.start, module.editing.guidance, module.tuning.guidance) == (0.0, 7.5, 7.5)
    tried = module.search.grid(module.editing)
    assert len(tried) == len(GRIDS["start"]) * len(GRIDS["guidance"])
    assert {each.guidance for each in tried} == {4.5, 7.5, 10.5}
    assert all(each.mixing == "concat" and each.sharpness == 1 for each in tried)
    assert not fits.model().search.is_active
    one = fits.model(candidates=3)
    assert [each.start for each in one.search.grid(one.editing)] == list(GRIDS["start"])


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"sharpness": "auto", "reading": "blend"}, "sharpness: expected 1 with reading blend"),
        ({"candidates": 0}, "candidates: expected 1 or more, got 0"),
        ({"judge": "clip"}, "judge: expected a search with it"),
    ],
)
def test_what_cannot_be_searched_is_refused(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        fits.model(**settings)


def test_the_model_itself_agrees_with_the_prompt_that_predicts_the_noise_better() -> None:
    module = fits.model()
    backbone = module.load_backbone(torch.float32)
    height, width = backbone.sample_size
    z_0 = backbone.encode(torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    there = denoising_agreement(module.denoiser, z_0, fits.SOURCE, fits.TARGET)
    back = denoising_agreement(module.denoiser, z_0, fits.TARGET, fits.SOURCE)
    assert there != 0 and (there > 0) != (back > 0)
    assert denoising_agreement(module.denoiser, z_0, fits.SOURCE, fits.SOURCE) == 0
    assert denoising_agreement(module.denoiser, z_0, fits.SOURCE, fits.TARGET) == there


def test_an_edit_whose_start_is_auto_shows_its_front_and_leaves_the_sheet(run: Path) -> None:
    answer = kvinv(
        *("edit", "--run", run, "--target", fits.TARGET, "--target", "a dog running", "--start", "auto"),
        *("--model.candidates", 2, "--trainer.accelerator", "cpu"),
    )
    assert answer.code == 0, answer.err
    assert answer.err.count("  those that no other beats in both:") == 2
    chosen = [line for line in answer.err.splitlines() if line.startswith("  chosen: start ")]
    assert all(", agreement " in line and ", likeness " in line for line in chosen)
    files = [Path(line.rpartition(": ")[2]) for line in chosen]
    assert len(files) == 2 and all(file.exists() for file in files)
    starts = {round(record["start"], 2) for record, _ in RunStore(run).edits()}
    assert starts == set(GRIDS["start"]) and len(RunStore(run).edits()) == 2 * len(starts)
    assert "exist" not in answer.err
    assert f"{len(starts)} edits of each target, in different settings of start" in answer.err
    width, height = fits.opened(run / "candidates.png").size
    assert width > 3 * 192 and height > 2 * 192


def test_the_chosen_edit_is_marked_on_the_sheets_and_first_in_the_report(run: Path) -> None:
    store = RunStore(run)
    fits.edit(store, "a dog", module=fits.model(steps=3, guidance=3.3))  # no part of the search
    before = [file for _, file in store.edits()]
    assert not bordered(run / "sheet.png")
    module = fits.model(start="auto", candidates=2, steps=3)
    fits.edit(store, fits.TARGET, "a dog", module=module)
    records = store.edits()
    assert [file for _, file in records[: len(before)]] == before  # noting figures keeps the order
    found = {file: search_of(record) for record, file in records if search_of(record)}
    assert {file for file, each in found.items() if each["chosen"]} == set(module.last_edits)
    assert all(each["judge"] is None and isinstance(each["agreement"], float) for each in found.values())
    assert bordered(run / "sheet.png") == 2 == bordered(run / "candidates.png")
    page = write_report(run, run / "report.html").read_text(encoding="utf-8")
    captions = re.findall(r"<figcaption><b>(.*?)</figcaption>", page)
    marks = ["chosen</span>" in caption for caption in captions if "agreement" in caption]
    assert marks == [True] * 2 + [False] * (2 * len(GRIDS["start"]) - 2)
    best = found[module.last_edits[0]]
    said = f"agreement {best['agreement']:.3g}, likeness {best['likeness']:.3g}, by the model itself"
    assert said in captions[2] + captions[3]
    assert fits.edit(store, "a dog", module=fits.model(steps=3)) and len(store.edits()) == len(records)


def test_of_two_searches_it_is_the_last_that_has_chosen(tmp_path: Path) -> None:
    edits, picture = Edits(tmp_path), Image.new("RGB", (2, 2))
    old, new, other = (
        edits.save(target, picture, {"target": target, "start": start, "figures": {"seconds": 1}})
        for target, start in (("a cat", 0), ("a cat", 1), ("a dog", 0))
    )
    edits.note_search("a cat", {old: {"chosen": True}})
    edits.note_search("a dog", {other: {"chosen": True}})
    edits.note_search("a cat", {new: {"chosen": True}})
    assert {file: search_of(record)["chosen"] for record, file in edits.all()} == {
        old: False, new: True, other: True
    }  # fmt: skip
    assert [file for _, file in edits.all()] == [old, new, other]
    assert edits.find("a cat", {"target": "a cat", "start": 0}) == old  # figures are no settings


def test_a_target_that_is_asked_for_twice_is_edited_once_and_found_for_both(run: Path) -> None:
    module = fits.model(start="auto", steps=3)
    fits.edit(RunStore(run), fits.TARGET, fits.TARGET, module=module)
    first, second = module.last_edits
    assert first == second and len(RunStore(run).edits()) == len(GRIDS["start"])


def test_edits_that_a_search_finds_are_counted_in_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for target, start, wanted in ((fits.TARGET, 0.1, 0), (fits.TARGET, "auto", 1), (fits.TARGET, "auto", 6)):
        lines = list[str]()
        data = SourceImages(run=str(run), targets=[target])
        trainer = fits.trainer(quiet=False)
        monkeypatch.setattr(trainer.observers.progress, "note", lines.append)
        trainer.edit(fits.model(start=start), data)
        found = [line for line in lines if "exist" in line]
        assert len(found) == min(wanted, 1)
        assert not found or (f"and {wanted - 1} more exist" in found[0]) == (wanted > 1)


def test_the_edits_of_a_picture_that_was_cropped_are_judged_as_well(tmp_path: Path) -> None:
    image, out = fits.picture(tmp_path / "wide.png", (40, 24)), tmp_path / "run"
    data = SourceImages(str(image), fits.SOURCE, [fits.TARGET], out=str(out), geometry="crop")
    fits.trainer().run(fits.model(start="auto"), data)
    assert len(RunStore(out).edits()) == len(GRIDS["start"])


def test_a_clip_judges_in_place_of_the_model(run: Path, tmp_path: Path) -> None:
    module = fits.model(start="auto", judge=str(checkpoints.clip(tmp_path / "clip")))
    fits.edit(RunStore(run), fits.TARGET, module=module)
    assert len(RunStore(run).edits()) == len(GRIDS["start"])
    answer = kvinv("edit", "--run", run, "--start", "auto", "--model.judge", tmp_path, "--target", "a dog")
    refused(answer, "has no config.json", "expected a CLIP folder")


def test_an_idle_search_is_none() -> None:
    assert not Search((), 1, None).is_active
