"""A run folder, or a folder of them, as one HTML file that needs nothing beside it."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from kvinv_pl.app.reports.curves import loss_curves
from kvinv_pl.app.reports.reproduce import as_yaml, edit_command, reproducing_settings, run_command
from kvinv_pl.app.reports.summaries import certificate, format_setting, search_summary, settings_of_edit
from kvinv_pl.data.images import slider
from kvinv_pl.data.runs.edits import CHOSEN, search_of
from kvinv_pl.data.runs.files import explaining_os_errors, write_atomically
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.data.source_image import SourceImage, images_in
from kvinv_pl.errors import UserError

LARGE = 1 << 20
"""Bytes of a picture from which it is put into the report as a JPEG."""


def write_report(folder: Path, file: Path) -> Path:
    """Write the report of a run folder, or of all runs in a folder, as an HTML file; its path."""
    failed = dict[str, str]()
    runs = list[dict[str, Any]]()
    for image in images_in(folder, [], failed):
        try:
            runs.append(_of_run(image, f"run{len(runs) + 1}"))
        except (UserError, KeyError) as error:
            why = f"its run.json lacks {error}" if isinstance(error, KeyError) else str(error)
            failed[str(image.store.folder)] = why
    if not runs:
        raise UserError("; ".join(failed.values()))
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    template = templates.get_template("report.html")
    page = template.render(folder=folder.name, runs=runs, failed=failed, slider=slider)
    write_atomically(file, page.encode("utf-8", "replace"))
    return file


def _of_run(image: SourceImage, name: str) -> dict[str, Any]:
    store, run = image.store, image.store.read_run()
    reconstruction, tuned = run.get("reconstruction"), "tuning" in run
    width, height = run["picture"]["size"]
    found: dict[str, Any] = {
        "name": name,
        "folder": store.folder.name,
        "title": run["source"] or run["picture"]["name"],
        "width": width,
        "height": height,
        "source": _inline(store.folder / "source.png"),
        "certificate": certificate(run),
        "passed": reconstruction["passed"] if reconstruction else None,
        "psnr": reconstruction["psnr_to_round_trip"] if reconstruction else None,
        "edits": sorted(
            [_of_edit(store, run, record, file) for record, file in store.edits() if tuned],
            key=lambda edit: not edit["chosen"],
        ),
        "settings": _rows(run),
    }
    if reconstruction:
        found["reconstruction"] = _inline(store.folder / "reconstruction.png")
        found["curves"] = loss_curves(reconstruction["phases"], run["scheduler"]["timesteps"])
    if tuned:
        found["command"] = run_command(run)
        found["yaml"] = as_yaml(reproducing_settings(run), run_command(run))
    return found


def _of_edit(
    store: RunStore, run: Mapping[str, Any], record: Mapping[str, Any], file: Path
) -> dict[str, Any]:
    return {
        "target": record["target"],
        "picture": _inline(file),
        "settings": settings_of_edit(record),
        "chosen": CHOSEN if search_of(record).get("chosen") else "",
        "searched": search_summary(record),
        "seconds": record.get("figures", {}).get("seconds"),
        "command": edit_command(store.folder, run, record),
    }


def _rows(run: Mapping[str, Any]) -> dict[str, str]:
    model, tuning = run["model"], dict(run.get("tuning", {}))
    sites = tuning.pop("sites", [])
    rows: dict[str, Any] = {
        "checkpoint": model["checkpoint"],
        "picture": f"{run['picture']['name']}, {run['picture']['size'][0]} x {run['picture']['size'][1]}",
        "steps": run["scheduler"]["steps"],
        "inversion": run["inversion"],
        **{name.replace("_", " "): value for name, value in tuning.items()},
        **({"self-attentions": len(sites)} if sites else {}),
        "checkpoint's sha256": model["sha256"],
        "versions": run["versions"],
    }
    if notes := run["picture"]["notes"]:
        rows["notes"] = notes
    return {name: format_setting(value) for name, value in rows.items()}


def _inline(file: Path) -> str:
    with explaining_os_errors("read", file):
        data, kind = file.read_bytes(), "png"
    if len(data) > LARGE:
        with Image.open(io.BytesIO(data)) as picture:
            picture.convert("RGB").save(buffer := io.BytesIO(), "JPEG", quality=92)
        data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
