"""A bench as one page of HTML that needs nothing beside it."""

import html
import json
import math
from base64 import b64encode
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from kvinv_pl.bench.benchmarks.cases import Case
from kvinv_pl.bench.reports.ranks import ranks
from kvinv_pl.bench.tables.columns import CAPPED, MEANINGS, is_psnr
from kvinv_pl.bench.tables.table import Mean, Report
from kvinv_pl.data.images import slider

TEMPLATE = Path(__file__).with_name("page.html")
LARGEST, SMALL = 384, 160  # pixels a side: what is shown at most, and up to which nothing is lost
AXES = (("right action %", "same animal %"), ("CLIP whole", "PIE PSNR"), ("PIE MSE x10^4", "PIE PSNR"))
"""What methods are weighed by, to the right and upward; the first pair that is known."""
ABOUT = {
    "row": "the method as it was typed, or pictures that no method makes",
    "cases": "edits that are there",
}
ABOUT_RANKS = {
    "metric": "a metric that needs no truth",
    "over methods": "rank correlation of the methods' means with those of the truth, and its 95 % interval",
    "over edits": "rank correlation of all edits of all methods with the truth, and its 95 % interval",
}
"""What the other headings say."""


def page(title: str, cases: Sequence[Case], report: Report, opened: Callable[[str, str], Image.Image]) -> str:
    """The page, with the pictures of these cases in it; opened(row, case) is an edited picture."""
    shown = []
    for case in cases:
        pictures = {"source": data_uri(case.picture())}
        for row, scores in report.rows.items():
            if case.name in scores and row != "source":
                pictures[row] = data_uri(opened(row, case.name))
        shown.append({"name": case.name, "source": case.source, "target": case.target, "pictures": pictures})
    known = report.known_columns
    measured = {name for name in known if any(report.mean(row, name).count for row in report.rows)}
    content = {
        "about": ABOUT,
        "about_ranks": ABOUT_RANKS,
        "columns": {name: MEANINGS.get(name, name) for name in known},
        "psnr": [name for name in known if is_psnr(name)],
        "capped": CAPPED,
        "notes": report.notes,
        "ours": report.ours,
        "rows": [
            {
                "name": row,
                "cases": len(scores),
                "failed": len(report.failed.get(row, ())),
                "means": [_plain(report.mean(row, name)) for name in known],
                "lost": [report.count_unmeasured(row, name) for name in known],
                "less": None
                if report.ours in (None, row)
                else [_plain(report.difference(row, name)) for name in known],
                "values": {name: _values(each.get(name) for each in scores.values()) for name in known},
            }
            for row, scores in report.rows.items()
        ],
        "axes": next((axes for axes in AXES if set(axes) <= measured), None),
        "ranks": [[each.metric, _plain(each.methods), _plain(each.edits)] for each in ranks(report)],
        "cases": shown,
    }
    return filled(title, content)


def filled(title: str, content: dict[str, Any]) -> str:
    """The template with its title and content; nothing in them can end the script that they stand in."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    template = template.replace("{{slider_style}}", slider.STYLE).replace("{{slider_script}}", slider.SCRIPT)
    template = template.replace("{{slider_label}}", slider.SOURCE_SHOWN)
    return template.replace("{{title}}", html.escape(title)).replace("{{content}}", text)


def data_uri(picture: Image.Image) -> str:
    """A picture as text: small ones as they are, larger ones as JPEG in a size to look at."""
    buffer, rgb = BytesIO(), picture.convert("RGB")
    small = max(rgb.size) <= SMALL
    rgb.thumbnail((LARGEST, LARGEST))
    rgb.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 88}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{b64encode(buffer.getvalue()).decode()}"


def _plain(mean: Mean) -> list[float] | None:
    return [round(value, 4) for value in (mean.value, mean.low, mean.high)] if mean.count else None


def _values(values: Any) -> Sequence[float]:
    """What is known, from the least to the largest."""
    return sorted(round(value, 4) for value in values if value is not None and math.isfinite(value))
