"""Which settings of an ablation are best, and whether the paper's findings hold."""

from collections.abc import Iterable

from kvinv_pl.bench.ablation import LIKENESS, Cell
from kvinv_pl.bench.tables.table import Mean, Report, markdown
from kvinv_pl.stages.editing.judge import pareto_optimal

ACTION, ANIMAL, QUALITY = "right action %", "same animal %", "animal dB"


def pareto_table(report: Report) -> str:
    """The front of right actions against the same animal, as a table; empty without a truth."""
    if not {ACTION, ANIMAL} <= set(report.known_columns):
        return ""
    rows = list(report.rows)
    points = [(report.mean(row, ACTION).value, report.mean(row, ANIMAL).value) for row in rows]
    lines = [
        [rows[n], report.mean(rows[n], ACTION), report.mean(rows[n], ANIMAL)] for n in pareto_optimal(points)
    ]
    return markdown([ACTION, ANIMAL], lines)


def findings(report: Report, cells: Iterable[Cell]) -> list[str]:
    """The paper's three findings, each with its figures: decoder best, early too similar, late lost."""
    cells = [cell for cell in cells if report.rows.get(str(cell))]
    if QUALITY not in report.known_columns or not cells:
        return []

    def mean(cell: Cell, column: str) -> float:
        return report.mean(str(cell), column).value

    def best_of(cells: Iterable[Cell]) -> Cell:
        return max(cells, key=lambda cell: mean(cell, QUALITY))

    places = {cell.place for cell in cells}
    best = {place: best_of(cell for cell in cells if cell.place == place) for place in places}
    lines = []
    if "decoder" in best and len(best) > 1:
        ours = best["decoder"]
        other = best_of(cell for place, cell in best.items() if place != "decoder")
        gap = report.difference(str(ours), QUALITY, str(other))
        lines.append(
            f"The decoder is best: {_verdict(gap)} ({QUALITY} of '{ours}' less that of '{other}', the best "
            f"of the other places: {gap})"
        )
    at = next(best[place] for place in ("decoder", *best) if place in best)
    row = sorted(
        (
            cell
            for cell in cells
            if (cell.place, cell.reading, cell.sharpness) == (at.place, at.reading, at.sharpness)
        ),
        key=lambda cell: cell.start,
    )
    if len(row) > 1:
        early, late = row[0], row[-1]
        alike = report.difference(str(early), LIKENESS, str(late))
        acts = report.difference(str(late), ACTION, str(early))
        lines.append(
            f"An early start is too similar to the source: {_verdict(alike)} for the likeness, "
            f"{_verdict(acts)} for the action ('{early}' is {alike} dB more like it than start "
            f"{late.start:g}, which has {acts} points more of right actions)"
        )
        unmeasured = report.difference(str(at), QUALITY, str(late))
        lines.append(
            f"A late start loses the subject: {_verdict(unmeasured)} ({QUALITY} of '{at}' less that of start "
            f"{late.start:g}: {unmeasured})"
        )
    return lines


def _verdict(difference: Mean) -> str:
    """Whether it is above 0 for sure."""
    if difference.count < 2 or (difference.low <= 0 <= difference.high):
        return "cannot be told"
    return "holds" if difference.low > 0 else "does not hold"
