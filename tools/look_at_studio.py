"""Work with the studio, read a report and a bench, in a real browser at desk and phone width; shots are kept.

Every step is checked: load, click, tune, stop, reload, go on, edit, compare, try several, a broken picture,
two pages at once, downloads; nothing is fetched from anywhere else, and nothing is wider than a phone.

    pip install playwright && playwright install chromium     # or --browser, for one that is installed
    python tools/look_at_studio.py --out shots
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import (  # pyright: ignore[reportMissingImports]  # no part of the dev tools
    Browser,
    Page,
    expect,
    sync_playwright,
)

from kvinv_pl.app.reports.report import write_report
from kvinv_pl.app.studio.serve import serve
from kvinv_pl.bench.benchmarks.cases import DrawnCase
from kvinv_pl.bench.reports.page import page as page_of_bench
from kvinv_pl.bench.tables.table import Report
from kvinv_pl.menagerie.case import Case as Drawn

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 300_000
"""Milliseconds for a step that tunes or edits."""
LONG = {"inner_steps": 40, "tolerance": 0.0, "tolerance_growth": 0.0}  # time enough to stop it


class Eye:
    """A browser, the folder of its screenshots, and what went wrong on its pages."""

    def __init__(self, browser: Browser, out: Path) -> None:
        self.browser, self.out = browser, out
        self.wrong: list[str] = []

    def page(self, size: Any, url: str) -> Page:
        """A page of its own, watched."""
        page = self.browser.new_context(viewport=size).new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: self.wrong.append(f"error on the page: {error}"))
        page.on("request", lambda request: self._is_ours(request.url))
        page.goto(url)
        return page

    def keep(self, page: Page, name: str) -> None:
        """A screenshot of the whole page, which must not be wider than its window."""
        page.wait_for_timeout(600)
        page.screenshot(path=self.out / f"{name}.png", full_page=True)
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        if wide > 0:
            self.wrong.append(f"{name}: {wide} pixels wider than the window")

    def _is_ours(self, url: str) -> None:
        place = urlsplit(url)
        if place.scheme in ("http", "https", "ws") and place.hostname not in ("127.0.0.1", "localhost"):
            self.wrong.append(f"fetched from elsewhere: {url}")


@contextmanager
def looking(out: Path, browser: str | None) -> Iterator[Eye]:
    """A browser without a window."""
    out.mkdir(parents=True, exist_ok=True)
    path = browser or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield (eye := Eye(opened, out))
        opened.close()
    assert not eye.wrong, "\n".join(eye.wrong)


def studio(eye: Eye, folder: Path, **settings: Any) -> None:
    """Everything that the studio is for, step by step."""
    blocks, bench = serve(folder, wait=False, **{**LONG, **settings})
    url = blocks.local_url
    page = eye.page(DESK, url)
    progress = page.locator("#progress")
    page.locator("#animals img").first.wait_for()
    eye.keep(page, "studio-empty")

    page.locator("#animals img").first.click()
    picture = page.locator("#picture img")
    picture.wait_for()
    page.wait_for_timeout(1000)
    picture.click()  # in the middle, where the animal is
    page.locator("#tinted img").wait_for()
    eye.keep(page, "studio-subject")
    page.get_by_text("Its subject, where it").click()
    page.get_by_role("button", name="No mask").click()
    expect(page.locator("#tinted")).to_be_hidden()

    page.get_by_role("button", name="Tune", exact=True).click()
    expect(progress).to_contain_text("left", timeout=PATIENCE)
    eye.keep(page, "studio-tuning")
    page.get_by_role("button", name="Stop").click()
    expect(progress).to_contain_text("stopped", timeout=PATIENCE)
    page.reload()
    expect(progress).to_contain_text("stopped", timeout=PATIENCE)
    page.get_by_role("button", name="Go on tuning").click()
    page.close()  # which loses nothing
    page = eye.page(DESK, url)
    progress = page.locator("#progress")
    expect(progress).to_contain_text("done", timeout=PATIENCE)
    expect(page.locator("#certificate")).to_contain_text("dB", timeout=PATIENCE)

    page.get_by_role("button", name="Edit", exact=True).click()
    expect(page.locator("#edits img")).to_have_count(1, timeout=PATIENCE)
    page.get_by_role("button", name="Try them").click()
    expect(page.locator("#edits img")).to_have_count(3, timeout=PATIENCE)
    page.get_by_text("Dials, which need").click()
    page.locator("#edits button:has(img)").first.click()
    expect(page.locator("#dial-start input[type=number]")).to_have_value("0.2", timeout=PATIENCE)
    eye.keep(page, "studio-edited")

    other = eye.page(PHONE, url)
    other.locator("#edits img").first.wait_for()
    for each, text in ((page, "one"), (other, "another")):  # two at once wait for one another
        each.locator("#target textarea, #target input").first.fill(f"a cat and {text}")
        each.get_by_role("button", name="Edit", exact=True).click()
    expect(page.locator("#edits img")).to_have_count(5, timeout=PATIENCE)
    expect(other.locator("#edits img")).to_have_count(5, timeout=PATIENCE)
    eye.keep(other, "studio-phone")

    for name, suffix in (("get-picture", ".png"), ("get-settings", ".yaml")):
        with page.expect_download() as waiting:
            page.locator(f"#{name}").click()
        assert waiting.value.suggested_filename.endswith(suffix)

    broken = folder.parent / "broken.png"
    broken.write_bytes(b"no picture")
    fresh = eye.page(DESK, url)
    fresh.locator("#picture input[type=file]").set_input_files(broken)
    fresh.wait_for_timeout(1500)
    fresh.get_by_role("button", name="Tune", exact=True).click()
    expect(fresh.get_by_text("broken.png").last).to_be_visible(timeout=PATIENCE)
    eye.keep(fresh, "studio-broken")
    blocks.close()
    bench.jobs.close()


def report(eye: Eye, folder: Path) -> None:
    """The report of a folder: from disk, its sliders, on a phone, on paper."""
    file = write_report(folder, eye.out / "report.html")
    page = eye.page(DESK, file.resolve().as_uri())
    slider = page.locator(".compare input").last
    slider.fill("20")
    assert slider.evaluate("each => each.parentElement.style.getPropertyValue('--at')") == "20%"
    eye.keep(page, "report")
    page.pdf(path=eye.out / "report.pdf", format="A4")
    eye.keep(eye.page(PHONE, file.resolve().as_uri()), "report-phone")


def bench(eye: Eye) -> None:
    """The page of a bench: sorted by a click, its slider, its cases and thumbnails, on a phone."""
    cases = {case.name: case for case in (DrawnCase(Drawn.of_seed(seed), 64) for seed in (900_000, 900_001))}
    columns = ("same animal %", "right action %", "PIE PSNR")
    rows = {
        row: {case: {columns[0]: value, columns[1]: 100 - value, columns[2]: value / 2} for case in cases}
        for row, value in (("low", 10.0), ("high", 90.0), ("middle", 50.0))
    }
    report = Report(rows, columns, dict.fromkeys(cases, ""), "middle")
    file = eye.out / "bench.html"
    text = page_of_bench("A bench", list(cases.values()), report, lambda row, case: cases[case].truth())
    file.write_text(text, encoding="utf-8")
    page = eye.page(DESK, file.resolve().as_uri())
    names, heads = page.locator("#table tbody td:first-child"), page.locator("#table th")
    assert names.all_inner_texts() == ["low", "high", "middle"]
    for column, order, sorting in (
        (2, ["high", "middle", "low"], "descending"),
        (2, ["low", "middle", "high"], "ascending"),
        (0, ["high", "low", "middle"], "ascending"),
    ):
        heads.nth(column).get_by_role("button").click()
        assert names.all_inner_texts() == order
        assert heads.nth(column).get_attribute("aria-sort") == sorting
    page.get_by_label("show each row less ours").check()
    expect(page.locator("#table tbody tr", has_text="low").locator("td").nth(2)).to_contain_text("-40.00")
    page.locator("#slider").fill("20")
    assert page.locator(".compare").evaluate("each => each.style.getPropertyValue('--at')") == "20%"
    second = list(cases.values())[1]
    page.locator("#case").select_option(second.name)
    expect(page.locator("#prompts")).to_contain_text(second.target)
    page.locator("#thumbs button", has_text="high").click()
    expect(page.locator("#caption")).to_contain_text("left of the line: the source; right: high")
    eye.keep(page, "bench")
    eye.keep(eye.page(PHONE, file.resolve().as_uri()), "bench-phone")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("shots"), help="where the screenshots go")
    parser.add_argument("--browser", help="the path of a Chromium; left out, one that is found")
    parser.add_argument("--steps", type=int, default=50, help="timesteps of the tuning")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, looking(given.out, given.browser) as eye:
        studio(eye, Path(place) / "runs", checkpoint="menagerie", accelerator="cpu", steps=given.steps)
        report(eye, Path(place) / "runs")
        bench(eye)
