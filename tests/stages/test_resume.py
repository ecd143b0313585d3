"""A fit that is killed, wherever that is, goes on to the files of one that was not, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import fits
import pytest
from commands import kvinv
from fits import SOURCE
from forked import begun

from kvinv_pl.data.runs import files
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.training.datamodule import SourceImages


def snapshots(monkeypatch: pytest.MonkeyPatch, out: Path, to: Path) -> list[Path]:
    """Copies of `out` as a crash leaves it: after every write, with a part of the next file."""
    write, taken = files.write_atomically, list[Path]()

    def patched(file: Path, *parts: bytes | memoryview) -> None:
        if out.exists():
            taken.append(to / str(len(taken)))
            shutil.copytree(out, taken[-1])
            begun = taken[-1] / file.relative_to(out)
            begun.parent.mkdir(parents=True, exist_ok=True)
            begun.with_name(f".{file.name}.0{files.TEMPORARY}").write_bytes(parts[0][: len(parts[0]) // 2])
        write(file, *parts)

    monkeypatch.setattr(files, "write_atomically", patched)
    return taken


def contents(out: Path) -> dict[str, Any]:
    """Everything that a fit leaves, but for the logs and the locks."""
    stores = [RunStore(file.parent) for file in sorted(out.rglob("run.json"))]
    found: dict[str, Any] = {f"{store.folder.name}": fits.tensors(store) for store in stores}
    found |= {f"{store.folder.name}/run": store.read_run() for store in stores}
    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    return found | {"names": {name for name in names if ".lock" not in name and "logs" not in name}}


CURRICULA: dict[str, dict[str, Any]] = {
    "carry": {"carry": True},
    "no carry": {"carry": False},
    "pivot": {"curriculum": "pivot"},
    "pivot, no carry": {"curriculum": "pivot", "carry": False},
}


@pytest.mark.parametrize(
    ("curriculum", "pictures", "slots", "retries", "precision"),
    [
        ("carry", 1, 1, 1, "32-true"),
        ("no carry", 2, 2, 0, "32-true"),
        ("pivot, no carry", 1, 1, 0, "32-true"),
        ("pivot", 2, 3, 0, "bf16-mixed"),
    ],
)
def test_a_crash_before_and_after_every_write_changes_no_bit(
    curriculum: str,
    pictures: int,
    slots: int,
    retries: int,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fits.pictures(tmp_path / "in", map(str, range(pictures)))
    module = fits.model(
        slots=slots, steps=2, inner_steps=1, required_psnr=99.0, retries=retries, store_dtype="float16",
        **CURRICULA[curriculum],
    )  # fmt: skip

    def given(out: Path) -> SourceImages:
        return SourceImages(str(tmp_path / "in"), SOURCE, out=str(out))

    trainer, whole = fits.trainer(precision=precision), tmp_path / "whole"
    from_the_start = curriculum == "carry"  # inversion is the same in every curriculum
    if not from_the_start:
        trainer.invert(module, given(whole))
    with monkeypatch.context() as patch:
        crashed = snapshots(patch, whole, tmp_path / "crashed")
        trainer.fit(module, datamodule=given(whole))
    # source, trajectory, run.json, what tuning is to be; then for each attempt two steps and its figures
    phases = 4 if "pivot" in curriculum else 2
    assert len(crashed) >= pictures * ((4 if from_the_start else 1) + (1 + retries) * (phases + 1))
    for out in crashed:
        trainer.fit(module, datamodule=given(out))
        assert contents(out) == contents(whole), out.name


def test_a_kill_loses_a_phase_at_most_and_changes_no_bit(tmp_path: Path) -> None:
    """In a process of its own. Other settings are crashed in this process, above."""
    fits.pictures(tmp_path / "in", "01")
    given = [
        "fit", "--image", tmp_path / "in", "--source", SOURCE, "--checkpoint", fits.checkpoint(),
        "--steps", 6, "--model.inner_steps", 2, "--model.tolerance_growth", 0, "--model.retries", 0,
        "--model.slots", 3, "--trainer.accelerator", "cpu", "--trainer.precision", "bf16-mixed",
        "--trainer.logger", "false", "--model.curriculum", "pivot", "--model.settle_steps", 4,
    ]  # fmt: skip
    assert kvinv(*given, "--out", tmp_path / "whole").code == 0
    store = RunStore(tmp_path / "killed" / "0")
    with begun(*given, "--out", tmp_path / "killed") as child:
        wait_for(store.folder / "steps" / "1.safetensors", child)
        before = store.done()
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
    assert before <= store.done() < {*range(6)}, "it was over before it was killed"
    assert kvinv(*given, "--out", tmp_path / "killed").code == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def wait_for(file: Path, child: Any) -> None:
    ends = time.monotonic() + 200
    while not file.exists():
        assert child.poll() is None and time.monotonic() < ends
        time.sleep(0.01)


def test_pictures_side_by_side_of_which_one_is_a_step_ahead_go_on_together(tmp_path: Path) -> None:
    fits.pictures(tmp_path / "in", "01")
    module = fits.model(slots=2)
    data = SourceImages(str(tmp_path / "in"), SOURCE, out=str(tmp_path / "out"))
    fits.trainer().fit(module, datamodule=data)
    whole = contents(tmp_path / "out")
    for image, kept in zip(data.images, (2, 1), strict=True):
        record = image.store.read_run()
        record.pop("reconstruction")
        image.store.write_run(record)
        for i in range(kept, 3):
            os.remove(image.store.folder / "steps" / f"{i}.safetensors")
    fits.trainer().fit(
        module, datamodule=SourceImages(str(tmp_path / "in"), SOURCE, out=str(tmp_path / "out"))
    )
    assert contents(tmp_path / "out") == whole
