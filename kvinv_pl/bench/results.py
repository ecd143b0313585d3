"""What a bench leaves to look at: tables, sheets of pictures, and one page."""

from __future__ import annotations

from pathlib import Path

from kvinv_pl.bench.ablation import Ablation
from kvinv_pl.bench.bench import Bench
from kvinv_pl.bench.fronts import findings, pareto
from kvinv_pl.bench.page import page
from kvinv_pl.bench.ranks import as_csv, as_markdown, ranks
from kvinv_pl.bench.records import Records
from kvinv_pl.bench.table import Report
from kvinv_pl.data.files import write_png
from kvinv_pl.data.sheet import sheet

NOTED = 2  # figures under a picture of a sheet


def write_results(bench: Bench, report: Report, shown: int) -> list[Path]:
    """Write everything; the paths, those to look at first.

    Args:
        bench: Whose pictures they are.
        report: Its figures.
        shown: How many cases are shown as pictures.
    """
    text = f"# {bench.data.title}\n\n{report.markdown()}"
    if found := ranks(report):
        text += f"\n## Do the metrics order edits as the truth does?\n\n{as_markdown(found)}\n"
    records = bench.records
    files = [
        records.write("page.html", page(bench.data.title, bench.data.cases[:shown], report, records.open)),
        records.write("table.md", text),
        records.write("figures.csv", report.csv()),
        records.write("figures.json", report.json()),
        *([records.write("ranks.csv", as_csv(found))] if found else []),
    ]
    return [*files, *_sheets(bench, report, shown)]


def write_ablation(ablation: Ablation, report: Report, shown: int) -> tuple[list[str], list[Path]]:
    """Write everything of an ablation; what is told of the paper's findings, and the paths, as above."""
    data = ablation.data
    parts = [f"# Ablation: {data.title}", report.markdown()]
    if best := pareto(report):
        parts.append(f"## The front of right action and same animal\n\n{best}")
    if lines := findings(report, ablation.ways):
        parts.append("## The paper's findings\n\n" + "\n".join(f"* {line}" for line in lines))
    text, records = "\n\n".join(parts) + "\n", Records(ablation.folder)
    files = [
        records.write(
            "page.html", page(f"Ablation: {data.title}", data.cases[:shown], report, ablation.open)
        ),
        records.write("table.md", text),
        records.write("figures.csv", report.csv()),
        records.write("figures.json", report.json()),
    ]
    return lines, [*files, *ablation.grids(shown), *ablation.strips(shown)]


def _sheets(bench: Bench, report: Report, shown: int) -> list[Path]:
    """A sheet for each of the first cases."""
    files = []
    for case in bench.data.cases[:shown]:
        pictures, captions = [case.picture()], [f"source: {case.source}\ntarget: {case.target}"]
        for row, scores in report.rows.items():
            if row == "source" or case.name not in scores:
                continue
            pictures.append(bench.records.open(row, case.name))
            figures = [(name, scores[case.name].get(name)) for name in report.known[:NOTED]]
            lines = [f"{name} {value:g}" for name, value in figures if value is not None]
            captions.append("\n".join([row, *lines]))
        files.append(
            write_png(bench.records.folder / "sheets" / f"{case.name}.png", sheet(pictures, captions))
        )
    return files
