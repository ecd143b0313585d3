"""The few columns of a report that decide, as text that fits a terminal."""

from textwrap import wrap

from kvinv_pl.bench.tables.columns import format_value
from kvinv_pl.bench.tables.table import Report

WITH_TRUTH = ("same animal %", "right action %", "animal dB", "background dB")
WITHOUT = ("PIE structure x10^3", "PIE PSNR", "CLIP whole")
ALWAYS = ("likeness to the source dB", "reconstruction dB", "seconds")
NARROWEST = 18  # characters, of the column with the rows' names


def summary(report: Report, width: int) -> str:
    """Means of all rows, in lines of `width` characters; columns at the right go first."""
    known = report.known_columns
    columns = [name for name in (*WITH_TRUTH, *ALWAYS) if name in known]
    if not set(WITH_TRUTH) & set(known):
        columns = [name for name in (*WITHOUT, *ALWAYS) if name in known]
    rows = list(report.rows)
    cells = [[_cell(report, row, name) for row in rows] for name in columns]
    widths = [max(map(len, [*name.split(), *values])) for name, values in zip(columns, cells, strict=True)]

    def left() -> int:
        return width - sum(each + 2 for each in widths)

    while len(widths) > 1 and left() < NARROWEST:
        widths.pop()
    label = min(max(NARROWEST, left()), max(map(len, rows), default=0))
    heads = [name.split() for name in columns[: len(widths)]]
    deepest = max(map(len, heads), default=0)
    lines = [
        _line("", [[*[""] * (deepest - len(head)), *head][n] for head in heads], label, widths)
        for n in range(deepest)
    ]
    for n, row in enumerate(rows):
        first, *others = wrap(row, label, subsequent_indent="  ")
        lines += [_line(first, [values[n] for values in cells[: len(widths)]], label, widths), *others]
    return "\n".join(lines)


def _cell(report: Report, row: str, column: str) -> str:
    mean = report.mean(row, column)
    return format_value(column, mean.value, ".1f") if mean.count else ""


def _line(name: str, values: list[str], label: int, widths: list[int]) -> str:
    cells = (f"  {value:>{width}}" for value, width in zip(values, widths, strict=True))
    return (name.ljust(label) + "".join(cells)).rstrip()
