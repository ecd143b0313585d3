"""`kvinv ablate`: the grid, its front, and what is said of the paper's findings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import fits
from commands import Answer, kvinv, refused

from kvinv_pl.bench.ablation import Ablation, Cell
from kvinv_pl.bench.bench import Setup
from kvinv_pl.bench.benchmarks.cases import drawn_world
from kvinv_pl.bench.reports.pareto import findings, pareto_table
from kvinv_pl.bench.tables.table import Report
from kvinv_pl.stages.editing.judge import pareto_optimal

QUICK = {"inner_steps": 1, "required_psnr": 0.0}


def ablate(out: Path, **others: Any) -> Answer:
    options = {
        "checkpoint": fits.checkpoint(), "cases": 1, "steps": 3, "guidance": 2.0, "accelerator": "cpu",
        "settings": json.dumps(QUICK), "out": out, **others,
    }  # fmt: skip
    return kvinv("ablate", *(f"--{name}={value}" for name, value in options.items()), *GRID)


GRID = [
    *("--place=decoder", "--place=masactrl", "--reading=frozen", "--reading=blend"),
    *("--start=0", "--start=0.7", "--sharpness=1", "--sharpness=2"),
]


def test_every_cell_is_rendered_from_one_tuned_run_of_its_place_and_again_nothing_is(tmp_path: Path) -> None:
    answer = ablate(tmp_path)
    assert answer.code == 0, answer.err
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 3 and "masactrl, frozen, sharpness 2, start 0.7" in rows
    assert rows["decoder, blend, start 0"]["means"]["likeness to the source dB"]["count"] == 1
    runs = [file.parent for file in tmp_path.glob("runs/*/*/run.json")]
    assert sorted(run.parent.name for run in runs) == ["decoder", "masactrl"]
    assert {file.name for file in (tmp_path / "grids").iterdir()} == {
        "1000000-frozen-1.png", "1000000-frozen-2.png", "1000000-blend-1.png",
    }  # fmt: skip
    assert fits.opened(tmp_path / "strips" / "1000000.png").width > 3 * 192
    assert "## The front of right action and same animal" in (tmp_path / "table.md").read_text()
    assert (
        "likeness" in answer.out and "accent" not in answer.out and str(tmp_path / "table.md") in answer.out
    )
    assert "steps 3: with so few" in answer.err
    assert "The decoder is best: cannot be told" in answer.out
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/**/*.png")}
    setup = Setup(str(fits.checkpoint()), 3, 2.0, QUICK, "cpu")
    cases = drawn_world((16, 16), 1, 1_000_000)
    again = Ablation(setup, cases, tmp_path, ["decoder"], ["frozen"], [1.0], [0.0, 0.7])
    again.run()
    assert all(file.stat().st_mtime_ns == before[file] for file in before if file.parent.name == "edits")


def test_a_place_that_there_is_not_is_refused(tmp_path: Path) -> None:
    refused(kvinv("ablate", "--place=top", "--out", tmp_path / "a", "--checkpoint", fits.checkpoint()), "top")


def test_the_front_has_what_no_other_beats() -> None:
    points = [(0.0, 9.0), (5.0, 5.0), (5.0, 4.0), (9.0, 0.0), (4.0, 4.0), (math.nan, 10.0)]
    assert pareto_optimal(points) == [0, 1, 3]
    assert pareto_optimal([(1.0, 1.0), (1.0, 1.0)]) == [0, 1]


def test_the_papers_findings_are_told_by_their_figures() -> None:
    """A world in which the decoder at 0.3 is best, 0.1 keeps the action and 0.9 loses the animal."""
    quality = {0.1: 15.0, 0.3: 18.0, 0.9: 10.0}
    cells = [Cell(place, "frozen", 1.0, start) for place in ("encoder", "decoder") for start in quality]
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for cell in cells:
        worse = 3.0 * (cell.place == "encoder")
        rows[str(cell)] = {
            str(n): {
                "animal dB": quality[cell.start] - worse + 0.1 * n,
                "right action %": 100.0 * (cell.start > 0.1),
                "same animal %": 100.0 * (cell.start < 0.9),
                "likeness to the source dB": 30 - 10 * cell.start + n,
            }
            for n in range(4)
        }
    columns = ("same animal %", "right action %", "animal dB", "likeness to the source dB")
    report = Report(rows, columns, {str(n): "" for n in range(4)})
    best, early, late = findings(report, cells)
    assert best.startswith("The decoder is best: holds (animal dB of 'decoder, frozen, start 0.3' less")
    assert "similar to the source: holds for the likeness, holds for the action" in early
    assert late.startswith("A late start loses the subject: holds")
    assert pareto_table(report).count("start 0.3") == 2
    assert findings(Report(rows, ("likeness to the source dB",), report.kinds), cells) == []
