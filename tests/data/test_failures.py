"""One bad picture among many: it is reported with its reason, and the others are done."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fits
import pytest
import torch
from commands import QUICK, kvinv
from fits import SOURCE, TARGET

from kvinv_pl.data.failures import Failures
from kvinv_pl.data.runs.files import TEMPORARY
from kvinv_pl.data.runs.lock import locked
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.errors import NoRoomError, SomeFailedError, UserError
from kvinv_pl.stages.tuning.slots import Member, Slots
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.devices.ranks import RankFailedError
from kvinv_pl.training.devices.strategy import ImageParallelStrategy
from kvinv_pl.training.module import KVInversion


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, of which the second is none."""
    fits.pictures(tmp_path / "in", "acd")
    (tmp_path / "in" / "b.png").write_text("no picture")
    return tmp_path / "in"


def tune(folder: Path, module: KVInversion, verb: str = "run") -> SourceImages:
    data = SourceImages(str(folder), SOURCE, [TARGET], out=str(folder.parent / "out"))
    if verb == "fit":
        fits.trainer().fit(module, datamodule=data)
    else:
        getattr(fits.trainer(), verb)(module, data)
    return data


def test_of_many_pictures_those_that_fail_are_reported_and_the_rest_is_done(folder: Path) -> None:
    answer = kvinv(
        "run", "--image", folder, "--source", SOURCE, "--target", TARGET, "--out", folder.parent / "out",
        "--checkpoint", fits.checkpoint(), *QUICK, "--trainer.accelerator", "cpu",
    )  # fmt: skip
    last = answer.err.splitlines()[-2:]
    assert answer.code == 1 and "Traceback" not in answer.err
    assert last[0].startswith(f"kvinv: {folder / 'b.png'}: ") and "cannot be read as a picture" in last[0]
    assert last[1].startswith("kvinv: error: 1 of 4 pictures failed")
    for name in "acd":
        assert len(RunStore(folder.parent / "out" / name).edits()) == 1
    assert not (folder.parent / "out" / "b").exists()


def test_where_all_fail_for_one_reason_it_is_said_once(folder: Path) -> None:
    (folder / "b.png").unlink()
    with pytest.raises(UserError, match=r"^no self-attention matches") as raised:
        tune(folder, fits.model(target_modules="nope", slots=2))
    assert not isinstance(raised.value, SomeFailedError) and raised.value.exit_code == 2


def test_a_damaged_run_among_many_does_not_stop_the_edits_of_the_others(folder: Path) -> None:
    (folder / "b.png").unlink()
    module = fits.model(steps=2, inner_steps=1)
    data = SourceImages(str(folder), SOURCE, out=str(folder.parent / "out"))
    fits.trainer().fit(module, datamodule=data)
    (data.images[0].store.folder / "run.json").write_text("{")
    step = data.images[1].store.folder / "steps" / "1.safetensors"
    step.write_bytes(step.read_bytes()[:-1] + b"x")
    with pytest.raises(SomeFailedError) as raised:
        fits.trainer().edit(module, SourceImages(run=str(data.out), targets=[TARGET]))
    said = {Path(label).name: reason for label, reason in raised.value.reasons.items()}
    assert said.keys() == {"a", "c"} and all("is damaged" in reason for reason in said.values())
    assert len(data.images[2].store.edits()) == 1


def blow_up(monkeypatch: pytest.MonkeyPatch, name: str, at_step: int) -> None:
    """From this phase on, one picture's pivot is not finite."""
    load = Slots._load

    def patched(self: Slots, image: SourceImage) -> Member:
        member = load(self, image)
        if image.name == name:
            member.pivots[len(self.denoiser.table) - at_step - 1] = float("nan")
        return member

    monkeypatch.setattr(Slots, "_load", patched)


@pytest.mark.parametrize("slots", [1, 3])
def test_a_picture_that_runs_away_is_given_up_and_those_beside_it_come_out_the_same(
    folder: Path, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "b.png").unlink()
    module = fits.model(slots=slots)
    whole = SourceImages(str(folder), SOURCE, out=str(folder.parent / "whole"))
    fits.trainer().fit(module, datamodule=whole)
    blow_up(monkeypatch, "c.png", 1)
    data = SourceImages(str(folder), SOURCE, out=str(folder.parent / "out"))
    with pytest.raises(SomeFailedError, match="1 of 3 pictures") as raised:
        fits.trainer().fit(module, datamodule=data)
    ((label, reason),) = raised.value.reasons.items()
    assert Path(label).name == "c.png" and "no longer finite at step 1" in reason
    assert data.images[1].store.done() == {0}
    for n in (0, 2):
        assert fits.tensors(data.images[n].store) == fits.tensors(whole.images[n].store)


def test_rows_of_one_picture_fail_apart(tmp_path: Path) -> None:
    fits.picture(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("image,source,mask\na.png,a cat,\na.png,a dog,no.png\n")
    data = SourceImages(str(tmp_path / "list.csv"), out=str(tmp_path / "out"))
    with pytest.raises(SomeFailedError, match="1 of 2 pictures") as raised:
        fits.trainer().invert(fits.model(steps=1), data)
    ((label, reason),) = raised.value.reasons.items()
    assert label == f"{tmp_path / 'a.png'} ({tmp_path / 'out' / 'a-2'})" and "no.png" in reason
    assert [image.store.has_trajectory() for image in data.images] == [True, False]


def test_of_a_picture_that_fails_no_folder_is_left_where_a_lock_goes_by_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""

    @contextmanager
    def passing(place: Path) -> Iterator[None]:
        with locked(place):
            yield
        (place / ".lock").unlink()

    monkeypatch.setattr("kvinv_pl.data.runs.run_store.locked", passing)
    monkeypatch.setattr("kvinv_pl.training.module.invert_picture", refuse)
    (folder / "b.png").unlink()
    with pytest.raises(UserError, match="not today"):
        tune(folder, fits.model(steps=1), "invert")
    assert not any((folder.parent / "out").glob("*"))


def refuse(*args: object) -> None:
    raise UserError("not today")


def test_a_full_disk_stops_everything_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("kvinv_pl.data.runs.run_store.os.fsync", full)
    with pytest.raises(NoRoomError, match=r"No space left.*make room"):
        tune(folder, fits.model(), "invert")
    assert TEMPORARY not in "".join(os.listdir(folder.parent))


def test_a_rank_that_fails_is_no_fault_of_the_picture_in_hand(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, begun = fits.model(inner_steps=1), list[int]()

    def on_train_batch_start(self: ImageParallelStrategy, batch: object, batch_idx: int) -> None:
        begun.append(batch_idx)
        raise RankFailedError("another rank has failed")

    monkeypatch.setattr(ImageParallelStrategy, "on_train_batch_start", on_train_batch_start)
    trainer = fits.trainer()
    with pytest.raises(RankFailedError):
        trainer.fit(module, datamodule=SourceImages(str(folder), SOURCE, out=str(folder.parent / "out")))
    assert begun == [0] and len(trainer.observers.failures.reasons) == 1  # of what is no picture


def test_a_picture_in_use_is_left_to_whoever_uses_it(folder: Path) -> None:
    (folder / "b.png").unlink()
    with RunStore(folder.parent / "out" / "a").lock(), pytest.raises(SomeFailedError) as raised:
        tune(folder, fits.model(steps=1, inner_steps=1), "invert")
    (reason,) = raised.value.reasons.values()
    assert "is in use by process" in reason
    assert all(RunStore(folder.parent / "out" / name).has_trajectory() for name in "cd")


def test_pictures_with_and_without_a_mask_are_not_tuned_side_by_side(tmp_path: Path) -> None:
    fits.picture(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "list.csv").write_text("image,mask\na.png,\nb.png,b.png\n")
    with pytest.raises(SomeFailedError) as raised:
        tune(tmp_path / "list.csv", fits.model(slots=2, steps=1, inner_steps=1), "fit")
    ((label, reason),) = raised.value.reasons.items()
    assert Path(label).name == "b.png" and "takes none" in reason  # of FullKV


def too_large() -> None:
    """What the CPU says, really."""
    torch.empty(2**50)


def of_mps() -> None:
    raise RuntimeError("MPS backend out of memory (MPS allocated: 18.13 GB, max allowed: 18.13 GB). Tried to")


def a_buffer_of_mps() -> None:
    raise RuntimeError("Invalid buffer size: 9.00 GiB")


def of_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(
    ("allocate", "said"),
    [
        (too_large, "DefaultCPUAllocator: (can't allocate|not enough) memory: you tried to allocate"),
        (of_mps, r"MPS backend out of memory \(MPS allocated: 18.13 GB, max allowed: 18.13 GB\)"),
        (a_buffer_of_mps, "Invalid buffer size: 9.00 GiB"),
        (of_cuda, "CUDA out of memory"),
    ],
)
def test_out_of_memory_of_any_device_is_the_matter_of_the_picture_that_is_too_large(
    allocate: Callable[[], None], said: str
) -> None:
    small, large = (SourceImage(name, RunStore(name), Path(name), "", []) for name in ("small", "large"))
    failures = Failures(2)
    with failures.catching([large]):
        allocate()
    assert failures.remaining([small, large]) == [small]
    assert re.match(rf"out of memory \({said}.*\): take a smaller working size", failures.reasons["large"])
    with pytest.raises(SomeFailedError):
        failures.raise_failures()
    with pytest.raises(UserError, match=r"^out of memory"), Failures(1).catching([large]):
        allocate()


def test_another_error_of_a_library_is_no_matter_of_memory() -> None:
    image = SourceImage("a", RunStore("a"), Path("a"), "", [])
    with pytest.raises(RuntimeError, match="size of tensor"), Failures(2).catching([image]):
        _ = torch.ones(2) + torch.ones(3)


def test_where_all_fail_the_line_names_three_and_counts_the_rest() -> None:
    failures = Failures(5)
    for n in range(5):
        failures.note(f"{n}.png", f"reason {n}")
    with pytest.raises(UserError, match=r"all 5 .*0\.png: reason 0; .*2\.png: reason 2; and 2 more$"):
        failures.raise_failures()
