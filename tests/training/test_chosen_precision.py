"""Which precision is chosen where none is asked for, and which an edit takes from its run."""

from __future__ import annotations

import json
from pathlib import Path

import fits
import pytest
import torch
from commands import QUICK, kvinv, photograph, refused
from fits import SOURCE, TARGET

from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.data.source_image import settings_of
from kvinv_pl.errors import UserError
from kvinv_pl.stages.settings import IDLE
from kvinv_pl.training import trainer as trainers
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.precision import precision_for

CPU = ("--trainer.accelerator", "cpu", "--trainer.logger", "false")


def tuned(folder: Path, precision: str, seed: int = 0) -> RunStore:
    data = SourceImages(str(fits.picture(folder.with_suffix(".png"), seed=seed)), SOURCE, out=str(folder))
    fits.trainer(precision=precision).fit(fits.model(steps=1, inner_steps=1), datamodule=data)
    return RunStore(folder)


def in_which_edited(run: Path, *args: object) -> str:
    answer = kvinv("edit", "--run", run, "--target", TARGET, "--overwrite", *CPU, *args)
    assert answer.code == 0, answer.err
    return RunStore(run).edits()[-1][0]["precision"]


@pytest.mark.parametrize("device", ["cpu", "mps"])
@pytest.mark.parametrize("checkpoint", ["menagerie", "owner/name"])
def test_without_a_gpu_that_has_bf16_it_is_full_whatever_the_machine(checkpoint: str, device: str) -> None:
    assert precision_for(checkpoint, torch.device(device)) == "32-true"


def test_on_a_gpu_the_embedded_model_is_in_full_and_any_other_in_what_the_gpu_has() -> None:
    gpu = torch.device("cuda")
    assert precision_for("menagerie", gpu) == "32-true"
    has_it = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    assert precision_for("owner/name", gpu) == ("bf16-mixed" if has_it else "32-true")


def test_a_precision_that_is_chosen_is_the_one_that_is_asked_for_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fits.tensors(tuned(tmp_path / "asked", "bf16-mixed"))
    full = fits.tensors(tuned(tmp_path / "full", "32-true"))
    assert fits.tensors(tuned(tmp_path / "auto", "auto")) == full != asked
    monkeypatch.setattr(trainers, "precision_for", lambda checkpoint, device: "bf16-mixed")
    store = tuned(tmp_path / "chosen", "auto")
    assert fits.tensors(store) == asked and store.read_run()["editing"]["precision"] == "bf16-mixed"


def test_what_is_chosen_is_said_once_and_what_is_typed_is_not(tmp_path: Path) -> None:
    given = (
        "--image", photograph(tmp_path / "cat.png"), "--source", SOURCE, "--checkpoint", fits.checkpoint(),
        *QUICK, *CPU, "--overwrite", "--out", tmp_path / "run",
    )  # fmt: skip
    says = "chosen by checkpoint and device: "
    for verb, typed, chosen in (
        ("fit", (), "guidance 7.5, precision 32-true"),
        ("invert", (), "precision 32-true"),
        ("fit", ("--guidance", 3), "precision 32-true"),
        ("fit", ("--trainer.precision", "bf16-mixed"), "guidance 7.5"),
        ("fit", ("--guidance", 3, "--trainer.precision", "32-true"), ""),
    ):
        answer = kvinv(verb, *given, *typed)
        assert answer.code == 0, answer.err
        said = [line.removeprefix(says) for line in answer.err.splitlines() if line.startswith(says)]
        assert said == ([chosen] if chosen else [])


def test_an_edit_is_in_the_precision_of_its_run_unless_another_is_typed(tmp_path: Path) -> None:
    run = tuned(tmp_path / "run", "bf16-mixed").folder
    assert in_which_edited(run) == "bfloat16"
    assert in_which_edited(run, "--trainer.precision", "32-true") == "float32"


def test_a_run_that_does_not_say_its_precision_is_edited_in_the_device_s(tmp_path: Path) -> None:
    """As older versions made them; beside others, too."""
    older, newer = (tuned(tmp_path / "runs" / name, "bf16-mixed") for name in ("older", "newer"))
    record = older.read_run()
    del record["editing"]["precision"]
    older.write_run(record)
    assert "trainer" not in settings_of(older.folder, IDLE)
    assert in_which_edited(older.folder) == "float32"
    assert settings_of(tmp_path / "runs", IDLE)["trainer"] == {"precision": "bf16-mixed"}
    assert settings_of(newer.folder, IDLE) == json.loads(json.dumps(settings_of(newer.folder, IDLE)))


def test_runs_of_two_precisions_are_edited_one_by_one(tmp_path: Path) -> None:
    for precision in ("bf16-mixed", "32-true"):
        tuned(tmp_path / "runs" / precision, precision)
    with pytest.raises(UserError, match="different settings: edit them one by one"):
        settings_of(tmp_path / "runs", IDLE)


def test_a_precision_that_this_machine_lacks_is_named_with_the_way_out(tmp_path: Path) -> None:
    store = tuned(tmp_path / "run", "32-true")
    record = store.read_run()
    record["editing"]["precision"] = "16-mixed"
    store.write_run(record)
    refused(kvinv("edit", "--run", store.folder, "--target", TARGET, *CPU), "16-mixed", "32-true")
