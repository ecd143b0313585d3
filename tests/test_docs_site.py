"""The site of the pages: each is in its navigation, links lead somewhere, public names are in it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import fits
import pytest

import kvinv_pl

ROOT = Path(__file__).parents[1]
CONF = runpy.run_path(str(ROOT / "docs" / "conf.py"))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
FENCE = re.compile(r"^ *```.*?^ *```$", re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Where a link into a page may lead: its headings, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation() -> None:
    of_site = [ROOT / f"{page}.md" for page in CONF["pages"]()]
    assert {*of_site, ROOT / "README.md"} == set(PAGES) and len(of_site) == len(set(of_site))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            found = page.parent / file if file else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), target


def test_the_page_of_the_python_names_has_all_of_them_and_no_other() -> None:
    listed = CONF["public_names"]()
    attention = set(import_module("kvinv_pl.attention").__all__) - set(kvinv_pl.__all__)
    assert {f"kvinv_pl.{name}" for name in kvinv_pl.__all__} <= set(listed)
    assert {f"kvinv_pl.attention.{name}" for name in attention} <= set(listed)
    for name in listed:
        module, _, last = name.rpartition(".")
        assert callable(getattr(import_module(module), last))


def test_what_the_page_of_the_python_names_shows_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "python.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    fits.picture(tmp_path / "cat.png")
    quick = f"{str(fits.checkpoint())!r}, accelerator='cpu', steps=3, inner_steps=1, retries=0"
    exec(code.replace('"menagerie"', quick), {})
    assert fits.opened(tmp_path / "running.png").size == (16, 16)


@pytest.mark.slow  # imports everything, and writes a page for each
def test_the_site_is_built_with_the_docstrings_and_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "-q",
        "-c",
        ROOT / "docs",
        "-d",
        tmp_path / "read",
        ROOT,
        tmp_path / "site",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "docs" / "python.html").read_text(encoding="utf-8")
    for name in CONF["public_names"]():
        assert f'id="{name}"' in page
    assert "Nothing is tuned again." in page  # of the docstring of an edit
    front = (tmp_path / "site" / "README.html").read_text(encoding="utf-8")
    assert all(f'href="{page}.html"' in front for page in CONF["pages"]())
    for each in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|link)[^>]*(?:src|href)="(https?:[^"]*)"', each.read_text(encoding="utf-8")
        )
        assert not fetched, each
