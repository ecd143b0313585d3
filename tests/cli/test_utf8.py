"""A file of options is UTF-8, whatever the locale is."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from kvinv_pl.cli.utf8 import open_files_as_utf8


def test_options_are_read_and_written_in_utf8_on_windows_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = builtins.open

    def as_on_windows(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        return plain(file, mode, *args, **({"encoding": "cp1252"} if "b" not in mode else {}) | options)

    monkeypatch.setattr(builtins, "open", as_on_windows)
    parser: Any = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--source", type=str)
    (tmp_path / "given.yaml").write_text("source: 走る猫\n", encoding="utf-8")
    open_files_as_utf8()
    read = parser.parse_args(["--config", str(tmp_path / "given.yaml")])
    assert read.source == "走る猫"
    parser.save(read, str(tmp_path / "saved.yaml"))
    assert "走る猫" in (tmp_path / "saved.yaml").read_text(encoding="utf-8")
