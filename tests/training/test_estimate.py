"""`kvinv plan`, which runs nothing, against what a fit really makes, takes and leaves."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from commands import kvinv, refused, tree
from fits import SOURCE, TARGET
from kvinv_plugins.low_rank import LowRank  # pyright: ignore[reportMissingImports]
from kvinv_plugins.masked import Masked  # pyright: ignore[reportMissingImports]

from kvinv_pl.cli.arguments import option_types
from kvinv_pl.data.failures import MEMORY_ADVICE
from kvinv_pl.errors import UserError
from kvinv_pl.models.costs import memory, timing
from kvinv_pl.models.costs.meta_model import TOKENS, prompt_tokens
from kvinv_pl.models.costs.timing import NetworkTimings, Timings, time_network
from kvinv_pl.stages.forwards import count_forwards
from kvinv_pl.stages.progress import format_seconds
from kvinv_pl.training import estimate
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.estimate import Estimate
from kvinv_pl.training.machine import Machine
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.trainer import KVTrainer

HERE = Machine(torch.device("cpu"), torch.float32, 1, 1e9)


@cache
def planned(*, size: int = 16, **settings: Any) -> Estimate:
    """Of one picture on the tiny checkpoint; counted once, which takes long."""
    return Estimate(fits.model(**settings), (size, size), 1, 1, HERE)


@pytest.mark.parametrize(
    "settings",
    [
        {"kv": "replayed"},
        {"curriculum": "pivot", "store_dtype": "int8"},
    ],
)
def test_the_forwards_and_the_disk_that_are_planned_are_those_of_a_fit_and_an_edit(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    module, rows = fits.model(slots=1, **settings), list[int]()
    unet = module.load_backbone(torch.float32).unet
    hook = unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    store = fits.fit(fits.picture(tmp_path / "cat.png"), tmp_path / "out", module)
    fits.edit(store, TARGET, module=module)
    hook.remove()
    counts = count_forwards(3, module.inverting, module.tuning, module.editing, module.denoiser.cps[0])
    assert len(rows) == counts.inversion + counts.tuning + counts.edit
    edited = counts.edit * (counts.edit_rows + counts.source_rows)
    assert sum(rows) == counts.inversion * counts.inversion_rows + counts.tuning * counts.tuning_rows + edited

    files = [store.folder / "trajectory.safetensors", *(store.folder / "steps").iterdir()]
    names = sum(len(store.step(i).psi) + 4 * len(module.denoiser.cps) + 2 for i in range(3)) * 250
    told = sum(planned(**settings).on_disk())
    assert told <= sum(file.stat().st_size for file in files) <= told + names


@pytest.mark.parametrize("kv", ["stored", "replayed"])
def test_the_memory_that_is_planned_for_a_slot_is_what_a_fit_reckons_with(kv: Any) -> None:
    module = fits.model(kv=kv)
    module.load_backbone(torch.float32)
    each = memory.bytes_per_slot(module.denoiser, (8, 8), 2.0, kv == "stored")
    plan = planned() if kv == "stored" else planned(kv=kv)  # stored is the default
    assert plan.costs.slot == pytest.approx(each, rel=0.1)  # of shorter prompts than 77 tokens


def test_the_advice_on_out_of_memory_names_options_that_take_less() -> None:
    kinds = option_types({"trainer.": KVTrainer, "model.": KVInversion, "data.": SourceImages})
    assert {flag.removeprefix("--") for flag in re.findall(r"--[\w.]+", MEMORY_ADVICE)} <= kinds.keys()
    before = planned()
    for less in (planned(size=12), planned(max_grid=4), planned(attention=LowRank), planned(kv="replayed")):
        assert less.costs.slot < before.costs.slot and sum(less.on_disk()) < sum(before.on_disk())


def test_a_variant_that_wants_a_mask_is_planned_without_one() -> None:
    assert planned(attention=Masked).costs.slot > planned().costs.slot


def test_a_prompt_of_more_chunks_is_planned_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prompt_tokens(["a BREAK b"], "plain") == TOKENS == prompt_tokens(["a", ""], "webui")
    assert prompt_tokens(["a, " * 50, "a"], "webui") == 2 * TOKENS
    long = Estimate(fits.model(prompt_syntax="webui"), (16, 16), 1, 1, HERE, ["a BREAK b", "a"])
    assert long.costs.slot > planned().costs.slot and long.costs.row > planned().costs.row


def test_the_network_is_timed_where_it_is_planned_for_or_at_less_where_that_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "ENOUGH", 0)
    plan, small = planned(attention=Masked), planned(size=4, attention=Masked)
    for speed, wanted, grid, costs in (
        (1e15, (8, 8), (8, 8), plan.costs),
        (1.0, (4, 4), (2, 2), small.costs),
    ):
        timed = time_network(plan._sketch_at, wanted, 2, 2, HERE.device, speed)
        assert timed.grid == grid
        assert (timed.forward.flop, timed.inner_step.flop) == (costs.forward, costs.inner_step)
        assert all(seconds > 0 for seconds in (*timed.forward.seconds, *timed.inner_step.seconds))


def test_the_time_that_is_planned_is_that_of_what_was_timed_times_its_count() -> None:
    plan = Estimate(fits.model(), (16, 16), 1, 2, HERE)
    counts, costs = plan.counts, plan.costs
    timed = Timings([60.0, 30.0, 120.0], costs.forward), Timings([600.0, 300.0, 1200.0], costs.inner_step)
    plan.__dict__["sample"] = NetworkTimings((4, 4), *timed)
    rows = counts.inversion * counts.inversion_rows + 2 * counts.edit * counts.edit_rows
    forwards = counts.tuning - counts.inner_steps + rows * costs.row / costs.forward
    low, middle, high = (
        format_seconds(part * (forwards + 10 * counts.inner_steps)) for part in (30, 60, 120)
    )
    time, how = (line for line in plan.lines() if line.startswith(("  time", "  timed")))
    assert f"about {middle} a picture, with 2 edits and all inner steps made; {low} to {high} by" in time
    assert "a forward 60 s, an inner step 600 s, at latents of 4 x 4, scaled up by operations" in how


def test_a_plan_needs_neither_a_picture_nor_weights_and_writes_nothing(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "ENOUGH", 0)
    quick = ("--checkpoint", bare, "--steps", 2, "--model.inner_steps", 2, "--trainer.accelerator", "cpu")
    answer = kvinv("plan", *quick, "--data.size", 12)
    assert answer.code == 0, answer.err
    assert "a picture of 12 x 12, latents of 6 x 6, 2 steps, float32 on cpu" in answer.out
    assert "forwards: inversion 2, tuning 4 to 6 (4 with a backward at most), the edits 2" in answer.out
    assert "slots: 1 (pictures one after the other)" in answer.out and not tree(tmp_path)
    assert "timed: a forward " in answer.out and "at latents of 6 x 6" in answer.out
    fits.pictures(tmp_path / "in", "01")
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 0)
    answer = kvinv("plan", *quick, "--image", tmp_path / "in", "--source", SOURCE, "--model.slots", 2)
    assert "2 pictures of 16 x 16" in answer.out
    assert "slots: 2 for pictures" in answer.out and "that is more than is free: take a smaller" in answer.out
    assert "a guess from products of matrices" in answer.out and "timed" not in answer.out
    assert tree(tmp_path) == {f"in/{seed}.png" for seed in range(2)}
    refused(kvinv("plan", *quick, "--image", tmp_path / "no.png"), "expected a picture file at")


def test_a_drive_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert estimate.first_existing(tmp_path / "new" / "run") == tmp_path
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"there is no .* for .*run: check"):
        patch.setattr(Path, "exists", lambda _: False)  # as every parent of Z:/run is, without a Z:
        estimate.first_existing(tmp_path / "run")
