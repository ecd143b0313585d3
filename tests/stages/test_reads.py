"""A command reads what lies on the disk once: the picture, run.json, the trajectory."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import pytest
from commands import kvinv
from PIL import Image

from kvinv_pl.data import source_image
from kvinv_pl.data.runs import run_store

STAGES = ("invert", "fit", "edit")


def counting(read: Callable[..., Any], counted: Counter[str]) -> Callable[..., Any]:
    def counts(path: str | Path, *args: Any) -> Any:
        counted[Path(path).name] += 1
        return read(path, *args)

    return counts


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was read by one of the ways in which the package reads it, by its name."""
    counted: Counter[str] = Counter()
    for where, name in (
        (run_store, "read_json"),
        (run_store, "read_tensors"),
        (source_image, "open_picture"),
        (source_image, "open_mask"),
    ):
        monkeypatch.setattr(where, name, counting(getattr(where, name), counted))
    return counted


def run(command: str, *more: object) -> None:
    done = kvinv(
        command, "--checkpoint", fits.checkpoint(), "--steps", 3, "--model.inner_steps", 2,
        "--model.retries", 1, "--model.required_psnr", 99, "--trainer.accelerator", "cpu",
        "--trainer.logger", "false", *more,
    )  # fmt: skip
    assert done.code == 0, done.err


def inputs(folder: Path) -> tuple[object, ...]:
    image = fits.picture(folder / "picture.png")
    return ("--image", image, "--source", fits.SOURCE, "--target", fits.TARGET, "--out", folder / "out")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The picture and its finished run; to be copied."""
    folder = tmp_path_factory.mktemp("made")
    run("run", *inputs(folder))
    return folder


def test_a_whole_run_reads_the_picture_and_the_trajectory_once(tmp_path: Path, reads: Counter[str]) -> None:
    run("run", *inputs(tmp_path))
    assert reads["picture.png"] == reads["trajectory.safetensors"] == 1
    assert reads["run.json"] <= len(STAGES)


def test_a_mask_is_opened_once_with_its_picture(tmp_path: Path, reads: Counter[str]) -> None:
    given = inputs(tmp_path)
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 12))
    mask.save(tmp_path / "mask.png")
    run("run", *given, "--mask", tmp_path / "mask.png", "--model.attention", "masked")
    assert reads["picture.png"] == reads["mask.png"] == 1


def test_a_run_that_is_done_is_read_once_to_see_so_and_once_when_it_is_held(
    made: Path, tmp_path: Path, reads: Counter[str]
) -> None:
    given = inputs(shutil.copytree(made, tmp_path / "made"))
    for command in ("run", "fit"):
        reads.clear()
        run(command, *given)
        assert reads["picture.png"] == 1 and reads["run.json"] <= 2
        assert reads["trajectory.safetensors"] <= (command == "run")


def test_an_edit_reads_the_trajectory_once_even_to_replay_the_source(
    made: Path, tmp_path: Path, reads: Counter[str]
) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    run("edit", "--run", tmp_path / "out", "--target", "a dog", "--model.kv", "replayed")
    assert reads["trajectory.safetensors"] == 1
    assert reads["run.json"] <= 4  # for its settings, its pictures, to check them, and held
