"""The report: one file with everything in it, and settings and commands that do the same again."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fits
import pytest
import yaml
from commands import kvinv, refused

from kvinv_pl.app.reports.curves import loss_curves
from kvinv_pl.app.reports.report import write_report
from kvinv_pl.app.reports.reproduce import as_yaml, edit_command, reproducing_settings, run_command
from kvinv_pl.app.reports.summaries import certificate
from kvinv_pl.bench.reports.page import filled
from kvinv_pl.data.images import slider
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.training.datamodule import SourceImages

TUNED = Path(__file__).parents[1] / "data" / "run_format_1" / "tuned"


class Page(HTMLParser):
    """Every tag, and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.fetched, self._open = list[str](), list[str](), list[str]()
        self.feed(text)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "input", "br", "link"):
            self._open.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href") and tag != "a"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            assert self._open.pop() == tag


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that an older version has written, with an edit."""
    shutil.copytree(TUNED, tmp_path / "runs" / "cat")
    return tmp_path / "runs"


def test_a_run_is_one_file_that_needs_nothing_beside_it(folder: Path) -> None:
    answer = kvinv("report", folder / "cat")
    assert answer.code == 0, answer.err
    assert answer.out.strip() == str(folder / "cat" / "report.html")
    text = (folder / "cat" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched and all(each.startswith(("data:image/png;base64,", "#")) for each in page.fetched)
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", text)
    for said in ("a cat running", "18.9 dB", "0 dB were asked for: it passed", "kvinv edit --run", "LowRank"):
        assert said in text
    assert text.count('type="range"') == 2 and "Loss before and after" in text


def test_both_pages_of_ours_compare_by_one_slider_with_the_source_on_the_left(folder: Path) -> None:
    report = write_report(folder / "cat", folder / "report.html").read_text(encoding="utf-8")
    for page in (report, filled("A bench", {})):
        assert slider.STYLE in page and slider.SCRIPT in page and page.count("clip-path: inset") == 1
        (below, above), *_ = re.findall(
            r'class="compare[^"]*"[^>]*>\s*(<svg|<img)[^§]*?<img[^>]*class="(\w+)"[^>]*><input type="range"',
            page,
        )
        assert below and above == "edited" and slider.SOURCE_SHOWN in page
    assert "inset(0 0 0 var(--at))" in slider.STYLE  # what is cut off the edit is on its left


def test_a_folder_of_runs_is_one_report_which_names_what_it_could_not_read(folder: Path) -> None:
    shutil.copytree(folder / "cat", folder / "dog")
    run = json.loads((folder / "dog" / "run.json").read_text())
    del run["reconstruction"], run["tuning"]
    shutil.rmtree(folder / "dog" / "edits")
    run["source"] = '<b>"a dog"</b> & 犬'
    (folder / "dog" / "run.json").write_text(json.dumps(run))
    shutil.copytree(folder / "cat", folder / "lost")
    (folder / "lost" / "run.json").write_text("{")
    answer = kvinv("report", folder, "-o", folder / "all.html")
    assert answer.code == 0, answer.err
    text = (folder / "all.html").read_text(encoding="utf-8")
    Page(text)
    assert "&lt;b&gt;&#34;a dog&#34;&lt;/b&gt; &amp; 犬" in text and "inverted and not tuned" in text
    assert "not read" in text and "run.json is damaged" in text and 'href="#run2"' in text


def test_what_is_no_run_or_no_page_is_refused(folder: Path, tmp_path: Path) -> None:
    refused(kvinv("report", tmp_path / "nowhere"), "there is no such folder")
    refused(kvinv("report", folder, "--out", "report.pdf"), "expected the name of an .html file")
    refused(kvinv("report"), "required: folder")


def test_its_settings_and_commands_make_the_same_run_and_the_same_edit_again(tmp_path: Path) -> None:
    image = fits.picture(tmp_path / "cat.png")
    settings: dict[str, Any] = {"negative": "a dog", "seed": 3, "tuning_guidance": 1.5, "carry": False}
    store = fits.fit(image, tmp_path / "run", **settings)
    (edited,) = fits.edit(store, "a dog", sharpness=1.5, start=0.4, guidance=3.0, negative="a cat")
    run, ((record, _),) = store.read_run(), store.edits()
    config = tmp_path / "settings.yaml"
    config.write_text(as_yaml(reproducing_settings(run), run_command(run)), encoding="utf-8")
    again = "kvinv run --config settings.yaml --image cat.png --data.size=16 --out again"
    assert run_command(run) == again
    answer = kvinv("fit", "--config", config, "--image", image, "--out", tmp_path / "again")
    assert answer.code == 0, answer.err
    again = RunStore(tmp_path / "again")
    assert fits.tensors(again) == fits.tensors(store)
    words = shlex.split(edit_command(again.folder, again.read_run(), record))
    assert {"--start=0.4", "--guidance=3.0", "--negative=a cat", "--model.sharpness=1.5"} == set(words[6:])
    answer = kvinv(*words[1:])
    assert answer.code == 0, answer.err
    ((_, file),) = again.edits()
    assert fits.opened(file).tobytes() == edited.tobytes()
    both = yaml.safe_load(as_yaml(reproducing_settings(run, record), ""))
    assert both["data"]["targets"] == ["a dog"] and both["model"]["sharpness"] == 1.5


def test_retries_are_those_that_were_asked_for_and_not_those_that_it_took(tmp_path: Path) -> None:
    store = fits.fit(
        fits.picture(tmp_path / "cat.png"), tmp_path / "run", required_psnr=0.0, retries=3, steps=1
    )
    run = store.read_run()
    assert len(run["reconstruction"]["attempts"]) == 1
    assert reproducing_settings(run)["model"]["retries"] == 3


def test_of_a_run_that_does_not_say_its_retries_nothing_is_made_up() -> None:
    run = json.loads((TUNED / "run.json").read_text())
    assert "retries" not in reproducing_settings(run)["model"]
    run["reconstruction"]["passed"] = False
    assert reproducing_settings(run)["model"]["retries"] == 0


def test_a_run_is_made_again_in_its_working_size_and_prompt_syntax(tmp_path: Path) -> None:
    image = fits.picture(tmp_path / "cat.png", (24, 16))
    syntax: dict[str, Any] = {"prompt_syntax": "webui", "steps": 1, "inner_steps": 1}
    data = SourceImages(str(image), "a (cat:1.4) standing", out=str(tmp_path / "run"), size=8)
    fits.trainer().fit(fits.model(**syntax), datamodule=data)
    run = RunStore(data.out).read_run()
    config = tmp_path / "settings.yaml"
    config.write_text(as_yaml(reproducing_settings(run), ""), encoding="utf-8")
    words = shlex.split(run_command(run, str(config)).replace("cat.png", str(image)))
    answer = kvinv("fit", *words[2:-1], tmp_path / "again")
    assert answer.code == 0, answer.err
    assert fits.tensors(RunStore(tmp_path / "again")) == fits.tensors(RunStore(data.out))


def test_losses_are_drawn_on_a_scale_of_powers_of_ten_zero_too() -> None:
    phases = [{"loss_start": 10.0**-n, "loss_end": 0.0, "inner_steps": n} for n in range(5)]
    drawn = loss_curves(phases, [901, 701, 501, 301, 101])
    before, after = re.findall(r'points="([^"]*)"', drawn)
    heights = [[float(point.split(",")[1]) for point in line.split()] for line in (before, after)]
    assert heights[0] == sorted(heights[0]) and len(set(heights[1])) == 1
    assert "timestep 901" in drawn and ">101<" in drawn


def test_the_certificate_says_whether_it_passed_and_how_often_it_was_tried() -> None:
    run = json.loads((TUNED / "run.json").read_text())
    found = run["reconstruction"]
    found |= {"passed": False, "psnr_demanded": 35.0, "attempts": [found["attempts"][0]] * 2}
    said = " ".join(certificate(run))
    assert "35 dB were asked for: it did not pass" in said and "tuned 2 times, at 18.9, 18.9 dB" in said
    assert "10.3 dB, of the 10.2 dB" in said
    assert "not tuned to the end" in " ".join(certificate({}))
