"""The notebook: every cell of it runs, in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fits
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "from_photograph_to_edit.ipynb"


def test_every_cell_of_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    monkeypatch.chdir(tmp_path)
    names, tiny = dict[str, Any](), repr(str(fits.checkpoint()))
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            # few steps of a tiny model; that the embedded one is loaded so, other tests show
            code = "".join(cell["source"]).replace("STEPS = 50", "STEPS = 3").replace('"menagerie"', tiny)
            exec(compile(code, str(NOTEBOOK), "exec"), names)
    assert names["STEPS"] == 3 and len(names["edits"]) == 4 and names["row"].size == (1024, 256)
    assert (tmp_path / "runs" / "animal" / "report.html").is_file()
