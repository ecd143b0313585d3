"""The nodes, as ComfyUI documents them: found by their mappings, and called with what their inputs say."""

from __future__ import annotations

import sys
from dataclasses import fields
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import fits
import pytest
import segmenters
import torch
from fits import SOURCE, TARGET

from kvinv_pl.app.comfyui import Bar, as_picture, as_tensor
from kvinv_pl.stages.settings import EditSettings

FOLDER = Path(__file__).parents[2] / "comfyui"


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    """The folder, loaded by its path as ComfyUI does."""
    spec = spec_from_file_location("custom_nodes.kvinv", FOLDER / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_node_has_what_comfyui_asks_for(nodes: ModuleType) -> None:
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        assert inputs["required"] and callable(getattr(node, node.FUNCTION)) and node.CATEGORY
        assert all(isinstance(kind, str) for kind in node.RETURN_TYPES)
        for kind, *options in (each for part in inputs.values() for each in part.values()):
            assert isinstance(kind, (str, list)) and all("tooltip" in o or "default" in o for o in options)


def test_every_setting_of_an_edit_is_an_input(nodes: ModuleType) -> None:
    given = nodes.NODE_CLASS_MAPPINGS["KVInversionEdit"].INPUT_TYPES()["optional"]
    assert set(given) == {setting.name for setting in fields(EditSettings)}
    assert given["start"][0] == "FLOAT" and given["start"][1]["max"] == 1.0
    assert given["reading"][0] == ["frozen", "blend"]
    assert given["guidance"] == ("STRING", {"tooltip": given["guidance"][1]["tooltip"], "default": ""})


def test_a_graph_from_checkpoint_to_edit_runs(nodes: ModuleType, tmp_path: Path) -> None:
    node = {name: cls() for name, cls in nodes.NODE_CLASS_MAPPINGS.items()}
    image = as_tensor(fits.opened(fits.picture(tmp_path / "cat.png", (24, 16))))
    assert image.shape == (1, 16, 24, 3) and as_picture(image).size == (24, 16)
    (model,) = node["KVInversionLoad"].run(str(fits.checkpoint()), "full_kv", 2, "32-true")
    run, reconstruction = node["KVInversionTune"].run(model, image, SOURCE, folder=str(tmp_path / "run"))
    stands: dict[str, Any] = {"start": 1.0, "guidance": "3", "subject": "", "reading": "blend"}
    (edited,) = node["KVInversionEdit"].run(run, TARGET, **stands)
    assert reconstruction.shape == edited.shape == image.shape and not torch.equal(edited, reconstruction)
    expected = run.edit(TARGET, start=1.0, guidance=3.0, reading="blend")
    assert torch.equal(edited, as_tensor(expected))
    (mask,) = node["KVInversionSubject"].run(image, 12, 8, str(segmenters.make(tmp_path / "sam")))
    assert mask.shape == (1, 16, 24) and set(mask.unique().tolist()) <= {0.0, 1.0}


def test_the_bar_is_moved_and_the_cancel_button_obeyed_where_comfyui_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved = list[int]()

    def cancel() -> None:
        if len(moved) == 2:
            raise RuntimeError("cancelled")

    management, utils = ModuleType("comfy.model_management"), ModuleType("comfy.utils")
    management.__dict__["throw_exception_if_processing_interrupted"] = cancel
    utils.__dict__["ProgressBar"] = lambda total: type(
        "P", (), {"update_absolute": staticmethod(moved.append)}
    )
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    monkeypatch.setitem(sys.modules, "comfy.utils", utils)
    bar = Bar()
    bar.begin("tuning", "a cat", 4)
    bar.advance("")
    bar.advance("")
    with pytest.raises(RuntimeError, match="cancelled"):
        bar.advance("")
    assert moved == [250, 500]
