"""What a bench leaves to look at: tables, sheets of pictures, and one page."""

from collections.abc import Sequence
from pathlib import Path

from kvinv_pl.bench.ablation import Ablation
from kvinv_pl.bench.bench import Bench
from kvinv_pl.bench.benchmarks.cases import Case
from kvinv_pl.bench.records import Records
from kvinv_pl.bench.reports.page import page
from kvinv_pl.bench.reports.pareto import findings, pareto_table
from kvinv_pl.bench.reports.ranks import as_csv, as_markdown, ranks
from kvinv_pl.bench.tables.columns import format_value
from kvinv_pl.bench.tables.table import Report
from kvinv_pl.data.images.sheet import sheet
from kvinv_pl.data.runs.files import write_png
from kvinv_pl.errors import UserError

CAPTION_METRICS = 2  # figures under a picture of a sheet


def write_results(bench: Bench, report: Report, shown: int) -> list[Path]:
    """Write everything, with so many cases shown as pictures; the paths, those to look at first."""
    data, records = bench.data, bench.records
    cases = [case for case in data.cases[:shown] if _opens(case)]  # what of the others fails is in the table
    text = f"# {data.title}\n\n{report.markdown()}"
    if found := ranks(report):
        text += f"\n## Do the metrics order edits as the truth does?\n\n{as_markdown(found)}\n"
    files = _written(records, report, text, page(data.title, cases, report, records.open))
    files += [records.write("ranks.csv", as_csv(found))] if found else []
    return [*files, *_sheets(bench, report, cases)]


def write_ablation(ablation: Ablation, report: Report, shown: int) -> tuple[list[str], list[Path]]:
    """Write everything of an ablation; what is told of the paper's findings, and the paths, as above."""
    data, title = ablation.data, f"Ablation: {ablation.data.title}"
    parts = [f"# {title}", report.markdown()]
    if best := pareto_table(report):
        parts.append(f"## The front of right action and same animal\n\n{best}")
    if lines := findings(report, ablation.cells):
        parts.append("## The paper's findings\n\n" + "\n".join(f"* {line}" for line in lines))
    html = page(title, data.cases[:shown], report, ablation.open)
    files = _written(Records(ablation.folder), report, "\n\n".join(parts) + "\n", html)
    return lines, [*files, *ablation.grids(shown), *ablation.strips(shown)]


def _written(records: Records, report: Report, text: str, html: str) -> list[Path]:
    contents = {
        "page.html": html,
        "table.md": text,
        "figures.csv": report.csv(),
        "figures.json": report.json(),
    }
    return [records.write(name, content) for name, content in contents.items()]


def _opens(case: Case) -> bool:
    try:
        case.picture()
    except UserError:
        return False
    return True


def _sheets(bench: Bench, report: Report, cases: Sequence[Case]) -> list[Path]:
    files = []
    for case in cases:
        pictures, captions = [case.picture()], [f"source: {case.source}\ntarget: {case.target}"]
        for row, scores in report.rows.items():
            if row == "source" or case.name not in scores:
                continue
            pictures.append(bench.records.open(row, case.name))
            metrics = [(name, scores[case.name].get(name)) for name in report.known_columns[:CAPTION_METRICS]]
            lines = [
                f"{name} {format_value(name, value, 'g')}" for name, value in metrics if value is not None
            ]
            captions.append("\n".join([row, *lines]))
        files.append(
            write_png(bench.records.folder / "sheets" / f"{case.name}.png", sheet(pictures, captions))
        )
    return files
