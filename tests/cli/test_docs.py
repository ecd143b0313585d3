"""docs/: its commands, in the order of the page, do what the page says that they do."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import segmenters
from commands import QUICK, kvinv

from kvinv_pl.cli.new_variant import write

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[tuple[str, str]]:
    """What a page has between fences: of which kind, and the text."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


BLOCKS = blocks("write-a-variant.md")


def without_figures(text: str) -> str:
    """Figures and times belong to the model and the machine, as does how often progress is told."""
    lines = [line for line in text.strip().splitlines() if not line.endswith(" left")]
    return re.sub(r"\d+(:\d+)?(\.\d+)?( min)?", "N", "\n".join(lines)).replace("N s", "N")


def test_the_page_shows_the_files_that_new_variant_writes(tmp_path: Path) -> None:
    code, config, test = (file.read_text(encoding="utf-8") for file in write("gated", tmp_path))
    whole, part = (text for kind, text in BLOCKS if kind == "python")
    (settings,) = (text for kind, text in BLOCKS if kind == "yaml")
    assert whole == code and part in test and config.endswith(settings)


def test_every_command_of_the_page_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = checkpoints.make("tiny", tmp_path_factory.mktemp("models"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for (kind, text), (following, shown) in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if kind != "sh":
            continue
        said = ""
        for line in text.splitlines():
            program, *args = shlex.split(line)
            if program == "pytest":
                # warnings are errors there, too
                done = subprocess.run(
                    [sys.executable, "-W", "error", "-m", "pytest", *args],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0 and " passed" in done.stdout, done.stdout
                continue
            assert program == "kvinv"
            # the tiny model reconstructs next to nothing, and says so; so few steps begin late, and say so
            told = ["--model.required_psnr", 0, "--model.timestep_spacing", "trailing"]
            quick = ["--checkpoint", model, *told, *QUICK] if args[0] == "run" else []
            answer = kvinv(*args, *quick)
            assert answer.code == 0, answer.err
            said = answer.err if args[0] == "run" else answer.out
        if following == "text":
            # the tiny checkpoint is not the embedded one, whose source guidance is chosen for it
            assert without_figures(said) == without_figures(shown.replace("source guidance 1, ", ""))
    assert (tmp_path / "runs" / "gated" / "sheet.png").exists()
    assert len(os.listdir(tmp_path / "runs" / "gated" / "edits")) == 4
    monkeypatch.delitem(sys.modules, "gated")


def test_every_command_of_the_page_on_masks_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("models")
    of_verb = {
        "run": ["--checkpoint", checkpoints.make("tiny", home), *QUICK],
        "mask": ["--sam", segmenters.make(home / "sam")],
    }
    monkeypatch.chdir(tmp_path)
    lines = [line for _, text in blocks("masks.md") for line in text.splitlines()]
    for line in lines:
        program, *args = shlex.split(line)
        if program == "kvinv":  # the tools are below
            answer = kvinv(*args, *of_verb.get(args[0], []))
            assert answer.code == 0, answer.err
    assert (tmp_path / "mask-shown.png").exists()
    assert set(os.listdir(tmp_path / "runs")) == {"full_kv", "masked", "recorded"}
    pages = [path.name for path in DOCS.glob("*.md")]
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"docs/{name}" in readme for name in pages)


PAGES = [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
TOOLS = [
    command
    for page in PAGES
    for command in re.findall(
        r"python (tools/\w+\.py(?:[^\n`#]|\\\n)*)", page.read_text(encoding="utf-8").replace("\\\n", " ")
    )
]


@pytest.mark.parametrize("command", sorted(set(TOOLS)))
def test_the_tools_that_the_pages_name_are_there_and_take_what_they_are_given(command: str) -> None:
    tool, *args = shlex.split(command)
    source = (DOCS.parent / tool).read_text(encoding="utf-8")
    for arg in args:
        if arg.startswith("--"):
            name = arg[2:].split("=")[0]
            assert re.search(rf"\b{name.replace('-', '_')}: |--{name}\b", source)
    if args and not args[0].startswith("-"):
        assert f"def {args[0]}(" in source


def test_the_pages_name_tools() -> None:
    assert len(set(TOOLS)) > 8
