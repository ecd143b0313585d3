"""`kvinv report`. The docstring is the help."""

from pathlib import Path

from kvinv_pl.errors import UserError


def report(folder: str, out: str | None = None) -> None:
    """Write one HTML file of a run, or of all runs in a folder: pictures, figures, settings, commands.

    Args:
        folder: The run folder, or a folder of them; `kvinv report DIR` does as well.
        out: The file (also -o); default: report.html in the folder.
    """
    from kvinv_pl.app.reports.report import write_report

    place = Path(folder).expanduser()
    file = place / "report.html" if out is None else Path(out).expanduser()
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"out: expected the name of an .html file, got {out}")
    print(write_report(place, file))
