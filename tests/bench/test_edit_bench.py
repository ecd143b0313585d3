"""EditBench on a miniature of its published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fits
import numpy as np
import pytest
from PIL import Image

from kvinv_pl.bench.benchmarks.edit_bench import edit_bench, is_edit_bench
from kvinv_pl.bench.benchmarks.image_list import ImageCase
from kvinv_pl.bench.benchmarks.pie import is_pie_bench
from kvinv_pl.errors import UserError

SIMPLE, COMPLEX, OBJECT = "10_change_simple_action", "9_change_complex_action", "1_change_object"


def entry(**others: Any) -> dict[str, Any]:
    return {
        "original_prompt": "A woman is holding\n flowers.", "editing_instruction": "Let her smile.",
        "edited_prompt": "A woman is holding flowers and smiling.", "edit_subject": "woman", **others,
    }  # fmt: skip


def mask(file: Path, column: int, size: int = 16) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    white = np.zeros((size, size), np.uint8)
    white[:, column] = 255
    Image.fromarray(white).save(file)


def meta(part: Path, kind: str, entries: Any) -> None:
    file = part / "meta_json" / f"{kind}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entries))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sizes and three types."""
    square, wide = tmp_path / "1024_1024", tmp_path / "1360_768"
    for part, kind, name in [
        (square, OBJECT, "a.png"),
        (square, SIMPLE, "b.png"),
        (square, COMPLEX, "c.jpg"),
        (wide, SIMPLE, "b.png"),
    ]:
        fits.picture(part / "images" / kind / name)
    mask(square / "mask" / SIMPLE / "b.png", 3)
    mask(wide / "masks" / SIMPLE / "b.png", 5)
    meta(square, OBJECT, [entry(image="a.png")])
    meta(square, SIMPLE, {"b": entry()})
    meta(square, COMPLEX, [entry(image_path=f"images/{COMPLEX}/c.jpg")])
    meta(wide, SIMPLE, [entry(image_id="b")])
    meta(square, "bak/2_add_object", [entry(image_id="gone")])  # set aside by its authors
    return tmp_path


def only(folder: Path, **others: Any) -> ImageCase:
    """The case of a folder whose one entry is this."""
    meta(folder, SIMPLE, [entry(**{"image_id": "b", **others})])
    (case,) = edit_bench(folder, None, []).cases
    assert isinstance(case, ImageCase)
    return case


def test_actions_come_first_and_every_size_is_read(folder: Path) -> None:
    assert is_edit_bench(folder) and is_edit_bench(folder / "1360_768")
    assert not is_edit_bench(folder / "1024_1024" / "images") and not is_pie_bench(folder)
    data = edit_bench(folder, None, [])
    assert [case.kind for case in data.cases] == [
        *("9 change complex action", "10 change simple action", "10 change simple action", "1 change object"),
    ]
    assert [case.name for case in data.cases][1:3] == [f"1024_1024-{SIMPLE}-b", f"1360_768-{SIMPLE}-b"]
    assert [case.kind for case in edit_bench(folder / "1360_768", None, []).cases] == [
        "10 change simple action"
    ]
    assert len(edit_bench(folder, 2, []).cases) == 2
    assert list(data.references) == ["source", "source through the VAE"]


def test_an_entry_has_its_two_prompts_and_its_picture_however_it_is_named(folder: Path) -> None:
    for case in edit_bench(folder, None, []).cases:
        assert case.source == "A woman is holding flowers."
        assert case.target == "A woman is holding flowers and smiling."
        assert case.picture().size == (16, 16)


def test_masks_have_the_names_of_their_pictures_or_are_named_and_several_are_one(folder: Path) -> None:
    by_name = {case.name: case.editable for case in edit_bench(folder, None, []).cases}
    for name, column in ((f"1024_1024-{SIMPLE}-b", 3), (f"1360_768-{SIMPLE}-b", 5)):
        editable = by_name[name]
        assert editable is not None and editable.any(0).nonzero()[0].tolist() == [column]
    assert by_name[f"1024_1024-{OBJECT}-a"] is None
    part = folder / "1360_768"
    mask(part / "masks" / SIMPLE / "second.png", 9)
    both = only(part, mask_images=["b.png", f"masks/{SIMPLE}/second.png"]).editable
    assert both is not None and both.any(0).nonzero()[0].tolist() == [5, 9]
    mask(part / "masks" / SIMPLE / "second.png", 2, 8)
    with pytest.raises(UserError, match=r"second.png is 8x8, its picture is .* make both the same size"):
        _ = only(part, mask="second.png").editable


def test_what_is_not_there_or_not_understood_is_told_in_one_line(folder: Path) -> None:
    part = folder / "1360_768"
    with pytest.raises(UserError, match=r"names .*gone.png, which is not there: unpack its archives"):
        only(part, image_id="gone.png")
    with pytest.raises(UserError, match=r"names .*gone.png, which is not there"):
        only(part, mask="gone.png")
    for broken, said in (
        ([{"image_id": "b"}], "KeyError 'original_prompt'"),
        ([entry()], "KeyError 'image_path or"),
        ([3], "is not a list of EditBench"),
    ):
        meta(part, SIMPLE, broken)
        with pytest.raises(UserError, match=said):
            edit_bench(part, None, [])
    (part / "meta_json" / f"{SIMPLE}.json").write_text("{")
    with pytest.raises(UserError, match="is not a list of EditBench"):
        edit_bench(part, None, [])
