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
from commands import QUICK, kvinv

from kvinv_pl import scaffold

PAGE = Path(__file__).parents[1] / "docs" / "write-a-variant.md"
BLOCKS: list[tuple[str, str]] = re.findall(
    r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S
)


def without_figures(text: str) -> str:
    """Figures and times belong to the model and the machine, as does how often progress is told."""
    lines = [line for line in text.strip().splitlines() if not line.endswith(" left")]
    return re.sub(r"\d+(:\d+)?(\.\d+)?( min)?", "N", "\n".join(lines)).replace("N s", "N")


def test_the_page_shows_the_files_that_new_variant_writes(tmp_path: Path) -> None:
    code, config, test = (file.read_text(encoding="utf-8") for file in scaffold.write("gated", tmp_path))
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
            quick = ["--checkpoint", model, *QUICK] if args[0] == "run" else []
            answer = kvinv(*args, *quick)
            assert answer.code == 0, answer.err
            said = answer.err if args[0] == "run" else answer.out
        if following == "text":
            assert without_figures(said) == without_figures(shown)
    assert (tmp_path / "runs" / "gated" / "sheet.png").exists()
    assert len(os.listdir(tmp_path / "runs" / "gated" / "edits")) == 4
    monkeypatch.delitem(sys.modules, "gated")
