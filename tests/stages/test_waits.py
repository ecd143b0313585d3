"""What waits for the device or for the disk, by counts, for which no GPU and no clock is needed."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import fits
import pytest
import torch
from fits import SOURCE
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from kvinv_pl.data.failures import Failures
from kvinv_pl.data.runs import files, layout
from kvinv_pl.data.runs.files import TEMPORARY
from kvinv_pl.data.runs.layout import TensorFile
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.data.writer import Writer
from kvinv_pl.errors import NoRoomError, UserError
from kvinv_pl.stages.editing.edit import in_batches
from kvinv_pl.stages.editing.reader import Reader
from kvinv_pl.stages.tuning.slots import Slots
from kvinv_pl.training.datamodule import SourceImages

ASKS = {"cpu", "item", "tolist", "numpy", "equal", "nonzero", "__bool__", "__float__", "__int__", "__index__"}
"""Of a tensor on a device: what waits for it. So does an index that is a mask."""


class OnDevice(Tensor):
    """A tensor as if it were on a device, as is whatever comes of it; what waits for it is counted.

    So is what is of 64 bits there.
    """

    waits: ClassVar[Counter[str]] = Counter()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else None
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            cls.waits["mask"] += 1
        if name not in ASKS:
            made = super().__torch_function__(func, types, args, kwargs or {})
            if isinstance(made, Tensor) and made.dtype == torch.float64:  # which Apple's GPUs do not have
                cls.waits["float64"] += 1
            return made
        cls.waits[name] += 1
        with torch._C.DisableTorchFunctionSubclass():
            plain = [arg.as_subclass(Tensor) if isinstance(arg, OnDevice) else arg for arg in args]
            return func(*plain, **(kwargs or {}))


@pytest.mark.parametrize(
    ("settings", "pictures"),
    [({}, 1), ({"slots": 2, "store_dtype": "int8"}, 2), ({"curriculum": "pivot"}, 1)],
)
def test_an_inner_step_waits_for_the_device_once_and_a_file_is_one_copy(
    settings: dict[str, Any], pictures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits.pictures(tmp_path / "in", map(str, range(pictures)))
    module, copies = fits.model(**{"slots": 1, **settings}), list[int]()
    data = SourceImages(str(tmp_path / "in"), SOURCE, out=str(tmp_path / "out"))
    fits.trainer().invert(module, data)
    levels, to_host = Slots.levels, layout.to_host
    monkeypatch.setattr(Slots, "levels", lambda *args: levels(*args).as_subclass(OnDevice))
    monkeypatch.setattr(layout, "to_host", lambda data: copies.append(data.nbytes) or to_host(data))
    OnDevice.waits.clear()
    fits.trainer().fit(module, datamodule=data)
    inner_steps, phases = (9 + 3, 6) if module.tuning.curriculum == "pivot" else (9, 3)
    assert len(copies) == phases * pictures
    # the loss of every inner step, that of the end of a phase, and files that have z-tilde in them
    assert OnDevice.waits == {"cpu": inner_steps + phases + 3 * pictures}


def test_a_step_of_an_edit_is_one_copy_and_two_steps_are_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, moved, ahead = fits.finished(tmp_path / "run"), list[str](), list[int]()
    on, eps = TensorFile.on, Reader.eps
    monkeypatch.setattr(TensorFile, "on", lambda self, device: moved.append(str(device)) or on(self, device))
    monkeypatch.setattr(
        Reader, "eps", lambda self, *args: ahead.append(len(self._prefetched)) or eps(self, *args)
    )
    fits.edit(store)
    assert moved == ["cpu"] * 3 and ahead == [2, 1, 0]


class Phases(Callback):
    """When a phase tunes for the first time, by its number."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.second = threading.Event()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.seen.append(("tunes", trainer.current_epoch))
        if trainer.current_epoch == 1:
            self.second.set()


def test_a_phase_is_written_while_the_next_one_is_tuned_and_never_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, phases, in_time = files.write_atomically, Phases(), list[bool]()

    def slow(file: Path, *parts: bytes | memoryview) -> None:
        if file.name == "0.safetensors":
            in_time.append(phases.second.wait(60))
        write(file, *parts)
        if file.parent.name == "steps":
            phases.seen.append(("written", int(file.stem)))

    monkeypatch.setattr(files, "write_atomically", slow)
    data = SourceImages(str(fits.picture(tmp_path / "cat.png")), SOURCE, out=str(tmp_path / "run"))
    fits.trainer(callbacks=[phases]).fit(fits.model(), datamodule=data)
    assert in_time == [True]
    assert phases.seen.index(("written", 0)) < phases.seen.index(("tunes", 2))
    assert phases.seen[-1] == ("written", 2) and data.images[0].store.read_run()["reconstruction"]


def test_a_disk_that_is_full_for_the_thread_that_writes_ends_the_fit_which_goes_on_later(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, whole = fits.model(), fits.tensors(fits.finished(tmp_path / "whole"))
    data, fsync = SourceImages(str(image), SOURCE, out=str(tmp_path / "run")), os.fsync
    store = data.images[0].store
    fits.trainer().invert(module, data)

    def full(number: int) -> None:
        if threading.current_thread().name.startswith("kvinv-writer") and store.done():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    with (
        monkeypatch.context() as patch,
        pytest.raises(NoRoomError, match=r"steps/1\.safetensors: No space left"),
    ):
        patch.setattr(os, "fsync", full)
        fits.trainer().fit(module, datamodule=data)
    assert store.done() == {0} and not [file for file in store.folder.rglob(f"*{TEMPORARY}")]
    assert fits.tensors(fits.fit(image, tmp_path / "run", module)) == whole


def test_a_file_that_cannot_be_written_fails_its_picture_alone() -> None:
    good, bad = (SourceImage(name, RunStore(name), Path(name), "", []) for name in ("good", "bad"))
    writer, written = Writer(failures := Failures(2)), list[int]()

    def refuse() -> None:
        raise UserError("psi is not finite")

    with writer.running():
        writer.submitter(bad)(refuse)
        writer.submitter(good)(lambda: written.append(1))
    assert written == [1] and failures.reasons == {"bad": "psi is not finite"}
    with pytest.raises(UserError, match="psi is not finite"):
        writer.submitter(bad)(refuse)  # at once, outside


def test_what_was_handed_on_is_written_before_an_error_goes_on() -> None:
    image, begun, written = SourceImage("a", RunStore("a"), Path("a"), "", []), threading.Event(), list[int]()
    writer = Writer(Failures())
    with pytest.raises(KeyboardInterrupt), writer.running():
        writer.submitter(image)(lambda: written.append(int(begun.wait(20))))
        begun.set()
        raise KeyboardInterrupt
    assert written == [1]


def test_targets_that_do_not_fit_into_memory_together_are_rendered_in_batches() -> None:
    tried = list[int]()

    def sampled(targets: list[str]) -> Tensor:
        tried.append(len(targets))
        if len(targets) > 2:
            torch.empty(2**50)
        return torch.tensor([float(target) for target in targets]).view(-1, 1, 1, 1)

    assert in_batches([str(n) for n in range(5)], sampled).flatten().tolist() == [0, 1, 2, 3, 4]
    assert tried == [5, 3, 2, 1, 2]
    with pytest.raises(RuntimeError, match="memory"):
        in_batches(["0"], lambda _: torch.empty(2**50))
