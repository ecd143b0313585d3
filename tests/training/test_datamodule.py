"""Pictures, folders and lists, and what a person writes into lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import photograph

from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.training.datamodule import SourceImages


def told(data: SourceImages) -> list[tuple[str, str, list[str], str]]:
    return [(image.name, image.source, image.targets, image.store.folder.name) for image in data.images]


def csv(tmp_path: Path, *lines: str) -> str:
    file = tmp_path / "list.csv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def jsonl(tmp_path: Path, *rows: object) -> str:
    file = tmp_path / "list.jsonl"
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(file)


def test_one_picture_has_the_out_folder_to_itself(tmp_path: Path) -> None:
    data = SourceImages("cat.png", "a cat", ["a dog"], out=str(tmp_path))
    (image,) = data.images
    assert (image.store.folder, image.path, image.source, image.targets) == (
        tmp_path,
        Path("cat.png"),
        "a cat",
        ["a dog"],
    )


def test_a_folder_gives_its_pictures_in_order_and_names_what_it_skips(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.jfif", "d", "e.dat"):
        photograph(tmp_path / name, format="PNG")
    for name in ("notes.txt", ".hidden.png", "list.csv"):
        (tmp_path / name).write_text("")
    (tmp_path / "more").mkdir()
    data = SourceImages(str(tmp_path), out="out")
    assert [image.name for image in data.images] == ["a.JPG", "b.png", "c.jfif", "d", "e.dat"]
    assert data.images[0].store.folder == Path("out/a")
    assert data.notes == [f"skipped in {tmp_path}, as they are not pictures: list.csv, more/, notes.txt"]


def test_masks_beside_their_pictures_in_a_folder_are_no_pictures(tmp_path: Path) -> None:
    for name in ("cat.png", "cat-mask.png", "dog.jpg", "dog-mask.png", "bear-mask.png"):
        photograph(tmp_path / name, format="PNG")
    data = SourceImages(str(tmp_path), out="out")
    assert [image.name for image in data.images] == ["bear-mask.png", "cat.png", "dog.jpg"]
    assert data.notes == [
        f"skipped in {tmp_path}, as they are masks by their names: cat-mask.png and 1 more; a list with the "
        "column mask gives each picture its own"
    ]


def test_many_files_that_are_skipped_are_counted(tmp_path: Path) -> None:
    photograph(tmp_path / "z.png")
    for n in range(8):
        (tmp_path / f"{n}.txt").write_text("")
    (note,) = SourceImages(str(tmp_path)).notes
    assert note.endswith("not pictures: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 3 more")


def test_a_damaged_picture_of_a_folder_is_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("I am a picture")
    (tmp_path / "b.jpg").symlink_to("nowhere")
    data = SourceImages(str(tmp_path))
    assert [image.name for image in data.images] == ["a.png", "b.jpg"] and data.notes == []


def test_what_a_row_leaves_out_is_taken_from_the_options(tmp_path: Path) -> None:
    file = csv(tmp_path, "image,source,targets,mask", "a.png,a cat,one | two,m.png", "sub/b.png,,,")
    data = SourceImages(file, "an animal", ["three"], mask="other.png", out="out")
    assert told(data) == [("a.png", "a cat", ["one", "two"], "a"), ("b.png", "an animal", ["three"], "b")]
    assert [image.path for image in data.images] == [tmp_path / "a.png", tmp_path / "sub" / "b.png"]
    assert [image.mask for image in data.images] == [tmp_path / "m.png", Path("other.png")]


def test_a_csv_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_bytes('\ufeffImage, Targets ,id\r\n"a, b.png",x,7\r\n\r\n'.encode())
    assert told(SourceImages(str(file))) == [("a, b.png", "", ["x"], "a, b")]


@pytest.mark.parametrize(("suffix", "separator"), [("tsv", "\t"), ("csv", ";"), ("CSV", "\t"), ("tsv", ",")])
def test_a_list_may_have_other_separators(tmp_path: Path, suffix: str, separator: str) -> None:
    file = tmp_path / f"list.{suffix}"
    rows = [
        ["id", "Image", "source", "targets"],
        ["1", "a.png", "a cat. standing", "one|two"],
        ["2", "b.png", "", ""],
    ]
    file.write_text("".join(separator.join(row) + "\n" for row in rows))
    data = SourceImages(str(file), "an animal", ["three"])
    assert told(data) == [
        ("a.png", "a cat. standing", ["one", "two"], "a"),
        ("b.png", "an animal", ["three"], "b"),
    ]
    file.write_text(separator.join(["image", "source"]) + "\n" + separator.join(["a.png", "a", "b"]))
    names = {",": "commas", ";": "semicolons", "\t": "tabs"}
    with pytest.raises(UserError, match=f"line 2 of .* quote {names[separator]}"):
        SourceImages(str(file))


def test_a_mask_the_other_way_round_needs_a_mask(tmp_path: Path) -> None:
    assert SourceImages("cat.png", mask="mask.png", invert_mask=True).images[0].invert_mask
    with pytest.raises(UserError, match="invert_mask: expected a mask with it"):
        SourceImages("cat.png", invert_mask=True)


def test_jsonl_says_the_same_as_csv(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path,
        {"image": "a.png", "source": "a cat", "targets": ["one", "two"]},
        "",
        {"image": "b.png", "source": None, "mask": None, "targets": "three|four", "id": 3},
    )
    assert told(SourceImages(file, "an animal")) == [
        ("a.png", "a cat", ["one", "two"], "a"),
        ("b.png", "an animal", ["three", "four"], "b"),
    ]


def test_rows_of_one_picture_and_source_share_its_run(tmp_path: Path) -> None:
    rows = ("a.png,a cat,one", "a.png,a cat,two", "a.png,a cat,one", "a.png,an animal,three")
    data = SourceImages(csv(tmp_path, "image,source,targets", *rows))
    assert told(data) == [("a.png", "a cat", ["one", "two"], "a"), ("a.png", "an animal", ["three"], "a-2")]


def test_pictures_of_one_name_get_a_folder_each(tmp_path: Path) -> None:
    names = ("x/cat.png", "y/Cat.png", "cat-2.png", "z/cat.jpg")
    data = SourceImages(csv(tmp_path, "image", *names))
    folders = [image.store.folder.name for image in data.images]
    assert folders == ["cat", "Cat-2", "cat-2-2", "cat-3"]
    assert len({folder.lower() for folder in folders}) == len(names)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            ["name,source", "a.png,a cat"],
            "has the columns name, source: expected image, source, targets, mask; name the column",
        ),
        (["image,target", "a.png,a dog"], "has a column 'target': rename it to targets"),
        (["image,source", ",a cat"], "line 2 of .* names no image: .* give it one or take it out"),
        (["image,source", "a.png,a cat, sitting"], "line 2 of .* has more fields than there are columns"),
        (["image", '"a.png'], "line 2 of .* is not CSV: .*; save the list as CSV again"),
        (["image,targets", "a.png,one||two"], "an empty target for a.png"),
        (["image"], "is empty: .* add some"),
        ([""], r"has the columns \(none\)"),
    ],
)
def test_a_csv_that_cannot_be_meant_is_refused(tmp_path: Path, lines: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        SourceImages(csv(tmp_path, *lines))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{image: a.png}", "line 2 of .* is not JSON .* fix the line"),
        ("[1, 2]", r"line 2 of .* expected an object .* got \[1, 2\]; fix it"),
        ({"source": "a cat"}, "has the columns source"),
        ({"image": 3}, "line 2 of .* image: expected text, got 3; fix it"),
        ({"image": "a.png", "targets": {"a": 1}}, "line 2 of .* targets: expected a list of texts"),
        ({"image": "a.png", "targets": [3]}, r"targets: expected a list of texts, got \[3\]"),
        ({"image": "a.png", "targets": [" "]}, "an empty target"),
        ({"image": ""}, "line 2 of .* names no image"),
    ],
)
def test_a_jsonl_that_cannot_be_meant_is_refused(tmp_path: Path, row: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        SourceImages(jsonl(tmp_path, {"image": "fine.png"}, row))


def test_a_list_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"cannot read the list .*nope.csv: No such file or directory; check the path"
    ):
        SourceImages(str(tmp_path / "nope.csv"))
    (tmp_path / "list.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="it is not UTF-8 text: save it as such"):
        SourceImages(str(tmp_path / "list.jsonl"))


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains no pictures \(it is empty\)"):
        SourceImages(str(tmp_path))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"contains no pictures \(got notes.txt\)"):
        SourceImages(str(tmp_path))


def test_a_run_has_the_targets_that_it_came_with_unless_others_are_given(tmp_path: Path) -> None:
    record = {"picture": {"name": "a.png", "mask": None, "mode": "keep"}, "source": "a cat"}
    RunStore(tmp_path).write_run(record)
    assert told(SourceImages(run=str(tmp_path)))[0][2] == []
    (image,) = SourceImages(run=str(tmp_path), targets=["one", "two"]).images
    image.remember_targets()
    assert told(SourceImages(run=str(tmp_path)))[0][2] == ["one", "two"]
    (image,) = SourceImages(run=str(tmp_path), targets=["three"]).images
    assert image.targets == ["three"]
    (image,) = SourceImages(run=str(tmp_path)).images
    image.targets = []
    image.remember_targets()  # of nothing, nothing is forgotten
    assert told(SourceImages(run=str(tmp_path)))[0][2] == ["one", "two"]
    RunStore(tmp_path).write_run(record | {"targets": "one"})
    with pytest.raises(UserError, match=r"run.json is damaged \(targets: expected a list of texts\)"):
        SourceImages(run=str(tmp_path))


def test_a_picture_or_a_run_has_to_be_named_and_not_both(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no picture: give --image"):
        SourceImages()
    with pytest.raises(UserError, match="expected either image or run, got both"):
        SourceImages("cat.png", run="runs/cat")
    with pytest.raises(UserError, match="size: expected none with run, which has its own, got 64"):
        SourceImages(run="runs/cat", size=64)
    with pytest.raises(UserError, match=r"is not a run folder: there is no such folder"):
        SourceImages(run=str(tmp_path / "nope"))
    with pytest.raises(UserError, match=r"is not a run folder: it has no run\.json"):
        SourceImages(run=str(tmp_path))


@pytest.mark.parametrize("given", [{"image": ""}, {"image": "a.png", "out": " "}, {"run": ""}])
def test_an_empty_path_is_not_taken_for_the_working_directory(given: dict[str, str]) -> None:
    with pytest.raises(UserError, match="expected a path, got an empty text"):
        SourceImages(**given)  # pyright: ignore[reportArgumentType]


def test_a_view_of_some_pictures_leaves_the_others_where_they_were(tmp_path: Path) -> None:
    for name in "abc":
        photograph(tmp_path / "in" / f"{name}.png")
    data = SourceImages(str(tmp_path / "in"), "a cat", out=str(tmp_path / "out"))
    everything, one = list(data.images), data.only(data.images[1:2])
    assert one.images == everything[1:2]
    assert (one.out, one.overwrite) == (data.out, data.overwrite)
    assert data.images == everything
