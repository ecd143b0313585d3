"""A run folder that an older kvinv made opens, goes on and is edited, to the same bits.

Bits can be asked for only where the processor adds up convolutions and matrix products in the order that it
had on the machine that made the folders: kernels are chosen by instruction set, and sums of floats depend on
their order. Where an inversion made here is not the folder's own, bit for bit, pictures are held to be within
one level of 255 instead.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from commands import kvinv

from kvinv_pl.data.runs.run_store import RunStore

MADE = Path(__file__).parents[1] / "data" / "run_format_1"
TRAINER = ("--trainer.accelerator", "cpu", "--trainer.logger", "false")
EDIT = "edits/a-cat-running"


def fit(out: Path) -> None:
    """The command that the folders were made by."""
    done = kvinv(
        "fit", "--image", MADE / "picture.png", "--source", "a cat standing", "--target", "a cat running",
        "--checkpoint", MADE / "checkpoint", "--steps", 4, "--guidance", 2.0, "--model.attention", "low_rank",
        "--model.attention.rank", 2, "--model.inner_steps", 3, "--model.tolerance", 0,
        "--model.tolerance_growth", 0, "--model.retries", 0, "--model.required_psnr", 0, *TRAINER,
        "--out", out,
    )  # fmt: skip
    assert done.code == 0, done.err


@pytest.fixture(scope="module")
def adds_up_alike(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether an inversion made here is to the bit the one that lies in the folder."""
    out = tmp_path_factory.mktemp("anew") / "run"
    fit(out)
    mine, its = RunStore(out).trajectory(), RunStore(MADE / "tuned").trajectory()
    torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)
    return torch.equal(mine, its)


def copied(name: str, to: Path) -> Path:
    """One of the folders to work in, with the checkpoint beside it as run.json names it."""
    shutil.copytree(MADE / "checkpoint", to / "checkpoint")
    return Path(shutil.copytree(MADE / name, to / name))


def same_picture(made: Path, before: Path, to_the_bit: bool) -> None:
    """Of the same pixels; how hard they are compressed is of no account."""
    assert fits.levels(fits.opened(made), fits.opened(before)) <= (0 if to_the_bit else 1)


def written(file: Path, *but: str) -> dict[str, Any]:
    """A record without what is a time or a place."""
    return {key: value for key, value in json.loads(file.read_text()).items() if key not in but}


def test_a_fit_that_was_killed_goes_on_where_it_was(tmp_path: Path, adds_up_alike: bool) -> None:
    out = copied("killed", tmp_path)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    fit(out)
    assert before == {file: file.stat().st_mtime_ns for file in before}, "steps were made again"
    same_picture(out / "reconstruction.png", MADE / "tuned" / "reconstruction.png", adds_up_alike)
    assert sorted(RunStore(out).done()) == [0, 1, 2, 3]
    if adds_up_alike:
        assert fits.tensors(RunStore(out)) == fits.tensors(RunStore(MADE / "tuned"))
        mine, its = (written(run / "run.json", "versions") for run in (out, MADE / "tuned"))
        assert mine["editing"].pop("precision") == "32-true"  # which older runs do not tell
        assert mine["reconstruction"].pop("retries") == 0  # likewise
        assert mine == its


def test_a_run_that_is_tuned_stays_as_it_is(tmp_path: Path) -> None:
    out = copied("tuned", tmp_path)
    before = {file: file.read_bytes() for file in out.rglob("*.*") if file.is_file()}
    fit(out)
    assert before == {file: file.read_bytes() for file in before}


@pytest.mark.parametrize("again", [True, False], ids=["rendered again", "not there yet"])
def test_a_run_that_is_tuned_is_edited_to_the_picture_that_it_was(
    again: bool, tmp_path: Path, adds_up_alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied("tuned", tmp_path)
    if not again:
        shutil.rmtree(out / "edits")
    monkeypatch.chdir(tmp_path)  # run.json names the checkpoint from here
    done = kvinv("edit", "--run", out, *TRAINER, *(["--overwrite"] if again else []))
    assert done.code == 0, done.err
    for name in (f"{EDIT}.png", "sheet.png"):
        same_picture(out / name, MADE / "tuned" / name, adds_up_alike)
    assert written(out / f"{EDIT}.json", "figures") == written(MADE / "tuned" / f"{EDIT}.json", "figures")


def test_an_edit_that_is_there_is_not_rendered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = copied("tuned", tmp_path)
    monkeypatch.chdir(tmp_path)
    before = (out / f"{EDIT}.png").stat().st_mtime_ns
    done = kvinv("edit", "--run", out, *TRAINER)
    assert done.code == 0 and "exists with these settings" in done.err, done.err
    assert (out / f"{EDIT}.png").stat().st_mtime_ns == before
