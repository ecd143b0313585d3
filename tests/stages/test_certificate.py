"""What a tuned picture is worth, and what is done where that is not enough."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from commands import kvinv
from fits import SOURCE, tensors
from kvinv_plugins.recorded import Recorded  # pyright: ignore[reportMissingImports]

from kvinv_pl.data.images.geometry import as_pixels, psnr
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.stages.tuning.certificate import Attempt, certify, next_attempt
from kvinv_pl.training.datamodule import SourceImages

DEMANDING: dict[str, Any] = {"required_psnr": 99.0, "retries": 2, "inner_steps": 2, "steps": 2}


@pytest.fixture(scope="module")
def tuned(image: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """A picture that does not pass after all its attempts."""
    return fits.fit(image, tmp_path_factory.mktemp("run"), **DEMANDING)


def test_the_certificate_holds_the_figures_that_its_files_give(tuned: RunStore) -> None:
    record, source = tuned.read_run()["reconstruction"], fits.opened(tuned.folder / "source.png")
    denoiser = fits.model(steps=2)
    backbone = denoiser.load_backbone(torch.float32)
    z = torch.stack([tuned.trajectory()[0], tuned.step(1).z])
    round_trip, tuned_pixels = backbone.decode(z)
    assert record["psnr_to_round_trip"] == round(psnr(tuned_pixels, round_trip), 2)
    reconstruction = fits.opened(tuned.folder / "reconstruction.png")
    assert record["psnr_to_source"] == round(psnr(as_pixels(reconstruction), as_pixels(source)), 2)
    assert record["psnr_of_round_trip_to_source"] > 0
    assert record["phases"] == [tuned.step_info(i) for i in range(2)]
    assert record["inner_steps"] == sum(info["inner_steps"] for info in record["phases"])


def test_a_picture_that_does_not_pass_is_tuned_again_with_more_steps_and_the_best_is_kept(
    tuned: RunStore, image: Path, tmp_path: Path
) -> None:
    record = tuned.read_run()["reconstruction"]
    assert record["psnr_demanded"] == 99 and not record["passed"]
    assert [attempt["inner_steps_at_most"] for attempt in record["attempts"]] == [2, 4, 8]
    worth = [attempt["psnr_to_round_trip"] for attempt in record["attempts"]]
    assert record["psnr_to_round_trip"] == max(worth) == worth[record["kept"]]
    longest = fits.fit(image, tmp_path / "run", **{**DEMANDING, "retries": 0, "inner_steps": 8})
    assert record["kept"] == 2 and tensors(tuned) == tensors(longest)
    assert tuned.read_run()["tuning"]["inner_steps"] == 2  # what was asked for
    assert not (tuned.folder / "attempts").exists()


def test_a_picture_that_passes_is_not_tuned_again(image: Path, tmp_path: Path) -> None:
    record = fits.fit(image, tmp_path / "run", required_psnr=1.0, retries=2).read_run()["reconstruction"]
    assert record["passed"] and len(record["attempts"]) == 1 and record["kept"] == 0


def test_where_nothing_is_learned_nothing_is_tried_again(image: Path, tmp_path: Path) -> None:
    settings = {"attention": Recorded, "required_psnr": 1000.0, "retries": 3}
    record = fits.fit(image, tmp_path / "run", **settings).read_run()["reconstruction"]
    assert not record["passed"] and len(record["attempts"]) == 1


def test_a_finished_run_is_tried_again_only_where_more_is_asked_of_it(image: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 2, "inner_steps": 1}
    store = fits.fit(image, tmp_path / "run", **settings, required_psnr=1.0, retries=1)
    before = tensors(store)
    fits.fit(image, tmp_path / "run", **settings, required_psnr=1.0, retries=1)
    assert tensors(store) == before
    fits.fit(image, tmp_path / "run", **settings, required_psnr=99.0, retries=1)
    record = store.read_run()["reconstruction"]
    assert len(record["attempts"]) == 2 and not record["passed"]


def test_what_is_advised_below_the_bar_helps(image: Path, tmp_path: Path) -> None:
    def run(*options: object) -> tuple[str, float]:
        answer = kvinv(
            "fit", "--image", image, "--source", SOURCE, "--checkpoint", fits.checkpoint(), "--steps", 2,
            "--model.required_psnr", 60, "--model.inner_steps", 2, "--guidance", 2, "--out", tmp_path / "run",
            "--trainer.accelerator", "cpu", "--trainer.logger", "false", *options,
        )  # fmt: skip
        assert answer.code == 0, answer.err
        record = RunStore(tmp_path / "run").read_run()["reconstruction"]
        return answer.err.splitlines()[-1], record["psnr_to_round_trip"]

    line, untuned = run("--model.attention", "recorded")
    attention, overwrite = re.findall(r"--\S+(?: full_kv)?", line)
    assert attention == "--model.attention full_kv" and "nothing is learned" in line
    line, once = run(*attention.split(), overwrite, "--model.retries", 0)
    assert once > untuned
    (retries,) = re.findall(r"--model.retries (\d)", line)
    assert retries == "2" and run("--model.retries", retries)[1] > once
    assert "is below" not in run("--model.required_psnr", 1)[0]


def test_an_attempt_that_is_worse_changes_nothing(tuned: RunStore, image: Path, tmp_path: Path) -> None:
    store = fits.fit(image, tmp_path / "run", **{**DEMANDING, "retries": 0, "inner_steps": 8})
    module, before = fits.model(steps=2), tensors(store)
    module.load_backbone(torch.float32)
    demanding = replace(module.tuning, required_psnr=99.0, retries=1)
    untuned = store.trajectory()[0] + 1
    for i in range(2):
        step = store.step(i)
        store.at_attempt(1).save_step(i, step.psi, untuned, step.kv, step.info)
    picture = (store.folder / "reconstruction.png").read_bytes()
    record = certify(module.denoiser, store.at_attempt(1), Attempt(1, demanding))
    assert record["kept"] == 0 and len(record["attempts"]) == 2
    assert record["attempts"][1]["psnr_to_round_trip"] < record["psnr_to_round_trip"]
    assert tensors(store) == before and (store.folder / "reconstruction.png").read_bytes() == picture
    assert next_attempt(store, demanding) is None
    assert next_attempt(store, replace(demanding, retries=2)) == 2


def test_a_crash_while_the_better_attempt_is_put_in_place_is_made_good(
    tuned: RunStore, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*rest: Any) -> None:
        raise KeyError("the end of the process")

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr("kvinv_pl.data.runs.run_store.os.replace", only_directories(crash))
        fits.fit(image, tmp_path / "run", **DEMANDING)
    store = RunStore(tmp_path / "run")
    assert not store.done() and store.read_run()["reconstruction"]["kept"] == 1
    fits.fit(image, tmp_path / "run", **DEMANDING)
    assert tensors(store) == tensors(tuned)
    assert store.read_run()["reconstruction"] == tuned.read_run()["reconstruction"]


def only_directories(crash: Any) -> Any:
    """os.replace that crashes where it is given a folder."""
    import os

    replace = os.replace
    return lambda there, here: crash() if Path(there).is_dir() else replace(there, here)


def test_of_pictures_side_by_side_only_those_that_do_not_pass_are_tuned_again(tmp_path: Path) -> None:
    fits.pictures(tmp_path / "in", "ab")
    settings: dict[str, Any] = {"steps": 2, "inner_steps": 2, "slots": 2}

    def fit(out: str, **more: Any) -> list[dict[str, Any]]:
        data = SourceImages(str(tmp_path / "in"), SOURCE, out=str(tmp_path / out))
        fits.trainer().fit(fits.model(**settings, **more), datamodule=data)
        return [image.store.read_run()["reconstruction"] for image in data.images]

    worth = [record["psnr_to_round_trip"] for record in fit("first")]
    between = sum(worth) / 2
    again = fit("again", required_psnr=between, retries=1)
    assert [len(record["attempts"]) for record in again] == [1 + (value < between) for value in worth]


@pytest.mark.parametrize("demand", [{"required_psnr": float("nan")}, {"retries": -1}])
def test_a_demand_that_means_nothing_is_refused(demand: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="required_psnr and retries: expected"):
        fits.model(**demand)
