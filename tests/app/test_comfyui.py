"""The nodes, as ComfyUI documents them: found by their mappings, and called with what their inputs say."""

from __future__ import annotations

import json
import shutil
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

from kvinv_pl.app.comfyui_types import Bar, as_mask, as_picture, as_tensor
from kvinv_pl.stages.settings import EditSettings

FOLDER = Path(__file__).parents[2] / "comfyui"
HANDED = ("IMAGE", "MASK", "KV_MODEL", "KV_RUN")
"""What comes from another node; the rest is typed in."""


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    """The folder, loaded by its path as ComfyUI does."""
    spec = spec_from_file_location("custom_nodes.kvinv", FOLDER / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs_of(node: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    return {name: each for part in node.INPUT_TYPES().values() for name, each in part.items()}


def test_every_node_has_what_comfyui_asks_for_and_says_what_everything_is(nodes: ModuleType) -> None:
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        assert node.INPUT_TYPES()["required"] and callable(getattr(node, node.FUNCTION)) and node.CATEGORY
        assert all(isinstance(kind, str) for kind in node.RETURN_TYPES) and node.DESCRIPTION
        assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES)
        for kind, said in inputs_of(node).values():
            assert said["tooltip"] and (kind in HANDED) == ("default" not in said)
            assert kind in (*HANDED, "STRING", "INT", "FLOAT", "BOOLEAN") or said["default"] in kind


def test_every_setting_of_an_edit_is_an_input(nodes: ModuleType) -> None:
    given = nodes.NODE_CLASS_MAPPINGS["KVInversionEdit"].INPUT_TYPES()["optional"]
    assert set(given) == {setting.name for setting in fields(EditSettings)}
    assert given["start"][0] == "FLOAT" and given["start"][1]["max"] == 1.0
    assert given["reading"][0] == ["frozen", "blend"]
    assert given["guidance"] == ("STRING", {"tooltip": given["guidance"][1]["tooltip"], "default": ""})


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    """The example that ComfyUI lists among its templates."""
    (file,) = (FOLDER / "example_workflows").glob("*.json")
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_example_fits_the_nodes(nodes: ModuleType, workflow: dict[str, Any]) -> None:
    each = {node["id"]: node for node in workflow["nodes"]}
    assert {node["type"] for node in each.values()} - set(nodes.NODE_CLASS_MAPPINGS) == {
        *("LoadImage", "PreviewImage", "SaveImage")
    }
    for number, start, slot, end, into, kind in workflow["links"]:
        made, taken = each[start]["outputs"][slot], each[end]["inputs"][into]
        assert made["type"] == taken["type"] == kind and number in made["links"] and taken["link"] == number
    for node in each.values():
        if (cls := nodes.NODE_CLASS_MAPPINGS.get(node["type"])) is not None:
            inputs = inputs_of(cls)
            linked = {name: kind for name, (kind, _) in inputs.items() if kind in HANDED}
            assert {each["name"]: each["type"] for each in node["inputs"]} == linked
            assert tuple(each["type"] for each in node["outputs"]) == cls.RETURN_TYPES
            typed = [said["default"] for kind, said in inputs.values() if kind not in HANDED]
            prompts = {"KVInversionTune": 1, "KVInversionEdit": 1}.get(node["type"], 0)
            assert node["widgets_values"][prompts:] == typed[prompts:]


def test_the_example_runs_from_picture_to_edit(
    nodes: ModuleType, workflow: dict[str, Any], tmp_path: Path
) -> None:
    image = as_tensor(fits.opened(fits.picture(tmp_path / "cat.png", (24, 16))))
    assert image.shape == (1, 16, 24, 3) and as_picture(image).size == (24, 16)
    typed = {
        "KVInversionLoad": [str(fits.checkpoint()), "full_kv", 2, "32-true"],
        "KVInversionTune": [SOURCE, str(tmp_path / "run")],
    }
    given = {number: (start, slot) for number, start, slot, *_ in workflow["links"]}
    made: dict[int, tuple[Any, ...]] = {}
    for node in sorted(workflow["nodes"], key=lambda node: node["order"]):
        handed = {
            each["name"]: made[given[each["link"]][0]][given[each["link"]][1]]
            for each in node["inputs"]
            if each["link"] is not None
        }
        if (cls := nodes.NODE_CLASS_MAPPINGS.get(node["type"])) is None:
            made[node["id"]] = (image, torch.zeros(1, 64, 64)) if node["type"] == "LoadImage" else (handed,)
            continue
        names = [name for name, (kind, _) in inputs_of(cls).items() if kind not in HANDED]
        values = typed.get(node["type"], node["widgets_values"])
        made[node["id"]] = getattr(cls(), cls.FUNCTION)(**handed, **dict(zip(names, values, strict=True)))
    kept = {node["type"]: made[node["id"]][0] for node in workflow["nodes"]}
    reconstruction, edited = kept["PreviewImage"]["images"], kept["SaveImage"]["images"]
    assert reconstruction.shape == edited.shape == image.shape and not torch.equal(edited, reconstruction)
    run = kept["KVInversionTune"]
    assert torch.equal(edited, as_tensor(run.edit("a striped blue cat running on sand")))
    stands: dict[str, Any] = {"start": 1.0, "guidance": "3", "subject": "", "reading": "blend"}
    (other,) = nodes.NODE_CLASS_MAPPINGS["KVInversionEdit"]().run(run, TARGET, **stands)
    assert torch.equal(other, as_tensor(run.edit(TARGET, start=1.0, guidance=3.0, reading="blend")))
    tune, folder = nodes.NODE_CLASS_MAPPINGS["KVInversionTune"], str(tmp_path / "run")
    # as it was, and as for a folder that is still to be made, until it has gone
    assert tune.IS_CHANGED(folder=folder) == tune.IS_CHANGED(folder=str(tmp_path / "other")) == ""
    shutil.rmtree(folder)
    assert (gone := tune.IS_CHANGED(folder=folder, image=None)) != gone


def test_a_mask_is_comfyuis_own_and_the_black_one_of_a_picture_without_any_is_none(
    nodes: ModuleType, tmp_path: Path
) -> None:
    image = as_tensor(fits.opened(fits.picture(tmp_path / "cat.png", (24, 16))))
    (mask,) = nodes.NODE_CLASS_MAPPINGS["KVInversionSubject"]().run(
        image, 12, 8, str(segmenters.make(tmp_path / "sam"))
    )
    assert mask.shape == (1, 16, 24) and set(mask.unique().tolist()) == {0.0, 1.0}
    whole, squeezed = as_mask(mask), as_mask(mask[0])
    assert whole is not None and squeezed is not None and whole.tobytes() == squeezed.tobytes()
    assert whole.size == (24, 16) and whole.mode == "L" and torch.equal(as_tensor(whole), mask)
    assert as_mask(torch.zeros(1, 64, 64)) is None and as_mask(None) is None


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
