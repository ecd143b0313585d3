"""The curriculum pivot: every timestep at its pivot, side by side in the slots; then psi settles."""

from functools import partial
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from by_hand import ByHand
from fits import SOURCE, UNTUNED, fit_all, infos
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]
from kvinv_plugins.recorded import Recorded  # pyright: ignore[reportMissingImports]
from torch import Tensor

from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.errors import SomeFailedError, UserError
from kvinv_pl.stages.progress import Progress
from kvinv_pl.stages.tuning.slots import Member, Slots
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.devices.ranks import Ranks
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.workload import Workload

PIVOT: dict[str, Any] = {"curriculum": "pivot"}
SGD = partial(torch.optim.SGD, lr=0.5)
"""Whose steps follow the gradient's size: what differs in the last bit goes on differing in the last bit."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fits.pictures(tmp_path_factory.mktemp("two"), "ab")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[int, tuple[dict[str, Tensor], dict[str, Any]]]]:
    """What the pass at the pivots has left, by run folder and step, which is dropped in the end."""
    seen: dict[str, dict[int, tuple[dict[str, Tensor], dict[str, Any]]]] = {}
    read = RunStore.pivot

    def pivot(self: RunStore, i: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        found = seen.setdefault(self.folder.name, {})[i] = read(self, i)
        return found

    monkeypatch.setattr(RunStore, "pivot", pivot)
    return seen


def psi(store: RunStore, steps: int = 3) -> list[dict[str, Tensor]]:
    return [store.step(i).psi for i in range(steps)]


def without_slots(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[0] for name, value in values.items()}


# ------------------------------------------------------------------------------------ both passes


@pytest.mark.parametrize("carry", [True, False])
def test_both_passes_equal_plain_loops(carry: bool, image: Path, tmp_path: Path, kept: Any) -> None:
    store = fits.fit(
        image, tmp_path / "run", **PIVOT, inner_steps=4, settle_steps=2, optimizer=SGD, carry=carry
    )
    by_hand = ByHand(image, optimizer=SGD)
    at_pivots = by_hand.tune_at_pivots(4)
    settled, z, losses = by_hand.settle(at_pivots, 2, carry)
    for i in range(3):
        found, info = kept["run"][i]
        torch.testing.assert_close(found, without_slots(at_pivots[i]), rtol=0, atol=5e-5)
        assert info["inner_steps"] == 4 and info["loss_end"] < info["loss_start"]
        torch.testing.assert_close(store.step(i).psi, without_slots(settled[i]), rtol=0, atol=5e-5)
        torch.testing.assert_close(store.step(i).z, z[i], rtol=0, atol=5e-5)
        info = store.step_info(i)
        assert (info["inner_steps"], info["inner_steps_at_pivot"]) == (2, 4)
        assert info["loss_start"] == pytest.approx(losses[i][0], rel=1e-4)
    assert store.read_run()["reconstruction"]["inner_steps"] == 3 * (2 + 4)


@pytest.mark.parametrize("settle_steps", [1, 3])
def test_settling_takes_as_many_steps_as_allowed_and_stops_where_it_has_converged(
    settle_steps: int, image: Path, tmp_path: Path
) -> None:
    store = fits.fit(image, tmp_path / "run", **PIVOT, settle_steps=settle_steps)
    assert [info["inner_steps"] for info in infos(store)] == [settle_steps] * 3
    untuned = fits.fit(image, tmp_path / "untuned", **PIVOT, settle_steps=settle_steps, tolerance=UNTUNED)
    assert [(info["inner_steps"], info["inner_steps_at_pivot"]) for info in infos(untuned)] == [(0, 0)] * 3


def test_the_pass_at_the_pivots_helps_the_roll_out(image: Path, tmp_path: Path) -> None:
    with_it = fits.fit(image, tmp_path / "with", **PIVOT, inner_steps=6, settle_steps=1)
    without = fits.fit(image, tmp_path / "without", carry=False, inner_steps=1)
    for there, here in zip(infos(with_it), infos(without), strict=True):
        assert there["loss_end"] < here["loss_end"]


# ----------------------------------------------------------------------------------------- slots


def test_who_shares_the_slots_changes_nothing(two: Path, tmp_path: Path, kept: Any) -> None:
    """Five slots hold three timesteps of one picture and two of the other, then one and four copies."""
    found: dict[int, dict[str, Any]] = {}
    for slots in (1, 2, 5):
        stores = fit_all(two, tmp_path / str(slots), **PIVOT, slots=slots, optimizer=SGD)
        found[slots] = {name: {i: kept[name][i][0] for i in range(3)} for name in "ab"}
        found[slots] |= {f"{name} settled": psi(stores[name]) for name in "ab"}
        found[slots] |= {f"{name} z": [stores[name].step(i).z for i in range(3)] for name in "ab"}
        kept.clear()
    for slots in (2, 5):
        torch.testing.assert_close(found[slots], found[1], rtol=0, atol=2e-5)
    assert not torch.allclose(found[1]["a z"][0], found[1]["b z"][0], atol=1e-3)


def test_each_slot_stops_by_the_tolerance_of_its_own_step(image: Path, tmp_path: Path, kept: Any) -> None:
    fits.fit(image, tmp_path / "untuned", **PIVOT, tolerance=UNTUNED)
    starts = [kept["untuned"][i][1]["loss_start"] for i in range(3)]
    growth = max(starts) * 1.01  # too much for step 0, whose tolerance is 0, and enough for all later ones
    for slots in (1, 3):
        fits.fit(image, tmp_path / str(slots), **PIVOT, slots=slots, tolerance_growth=growth)
        assert [kept[str(slots)][i][1]["inner_steps"] for i in range(3)] == [3, 0, 0]


def test_a_step_without_effect_is_not_tuned(image: Path, tmp_path: Path, kept: Any) -> None:
    checkpoint = fits.checkpoint(steps_offset=0, set_alpha_to_one=False)
    store = fits.fit(image, tmp_path / "run", **PIVOT, slots=3, checkpoint=str(checkpoint))
    assert [info["inner_steps"] for info in infos(store)] == [1, 1, 0]
    assert [info["inner_steps_at_pivot"] for info in infos(store)] == [3, 3, 0]


def test_one_picture_fills_the_slots_where_nobody_has_said_how_many(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = fits.model(**PIVOT, slots="auto")
    data = SourceImages(str(image), SOURCE, out=str(tmp_path / "run"))
    fits.trainer(quiet=False).fit(module, datamodule=data)
    said = capsys.readouterr().err
    assert "slots: 3 of 3 timesteps side by side (each takes about " in said
    assert "tuning at the pivots cat.png: 3 steps" in said and "tuning cat.png: 3 steps" in said


def test_ranks_that_cannot_ask_one_another_have_the_same_shares_whatever_fits_into_memory(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "is_one_of_many", True)
    data = SourceImages(str(two), SOURCE, out=str(tmp_path / "out"))
    workload = Workload(fits.model(**PIVOT, slots="auto"), data, ["invert", "fit"], dry_run=False)
    assert fits.trainer()._make_shares(workload) == [(3, [0]), (3, [1])]
    monkeypatch.undo()
    assert fits.trainer()._make_shares(workload) == [(6, [0, 1])]


def test_every_device_has_pictures_to_roll_out(two: Path, tmp_path: Path) -> None:
    data = SourceImages(str(two), SOURCE, out=str(tmp_path / "out"))
    workload = Workload(fits.model(**PIVOT, slots="auto"), data, ["invert", "fit"], dry_run=False)
    workload.model.load_backbone(torch.float32)
    assert workload.shares(2, torch.device("cpu"), Progress(quiet=True)) == [(3, [0]), (3, [1])]


def test_a_random_start_is_that_of_the_timestep_in_the_other_curriculum(image: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"attention": partial(FullKV, start="noise"), "tolerance": UNTUNED, "seed": 5}
    pivot = fits.fit(image, tmp_path / "pivot", **settings, **PIVOT, slots=2)
    torch.testing.assert_close(psi(pivot), psi(fits.fit(image, tmp_path / "run", **settings, carry=False)))


def test_the_sources_own_k_and_v_are_seen_at_the_pivot(image: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"attention": partial(FullKV, start="source"), "tolerance": UNTUNED, **PIVOT}
    together = psi(fits.fit(image, tmp_path / "together", **settings, slots=3))
    torch.testing.assert_close(together, psi(fits.fit(image, tmp_path / "singly", **settings)))
    name = next(name for name in together[0] if name.endswith("k_hat"))
    assert not torch.allclose(together[0][name], together[1][name], atol=1e-3)


def test_pictures_that_share_the_slots_have_masks_of_their_own(tmp_path: Path) -> None:
    rows = ["image,source,mask"]
    for seed, name in enumerate("ab"):
        fits.picture(tmp_path / f"{name}.png", seed=seed)
        fits.picture(tmp_path / f"{name}-mask.png", seed=seed + 2)
        rows.append(f"{name}.png,{SOURCE},{name}-mask.png")
    (tmp_path / "list.csv").write_text("\n".join(rows))

    class Seen(FullKV):
        """A variant that takes a mask, and says with which it worked."""

        masks: list[Tensor] = []  # noqa: RUF012

        def bind(self, mask: Tensor | None) -> None:
            if mask is not None:
                self.masks.append(mask)

    fit_all(tmp_path / "list.csv", tmp_path / "out", **PIVOT, attention=Seen, slots=4)
    *_, first, second, rolling = (Seen.masks[n] for n in (-3 * _sites(Seen), -2 * _sites(Seen), -1))
    a, b = rolling
    torch.testing.assert_close(first, torch.stack([a, a, a, b]))
    torch.testing.assert_close(second, torch.stack([b, b, b, b]))
    assert not torch.equal(a, b)


def _sites(variant: Any) -> int:
    module = fits.model(attention=variant)
    module.load_backbone(torch.float32)
    module.denoiser.place((8, 8), 1)
    return len(module.denoiser.cps)


# ---------------------------------------------------------------------------------- the run folder


def test_a_run_of_the_other_curriculum_is_refused_by_name(image: Path, tmp_path: Path) -> None:
    store = fits.fit(image, tmp_path / "run", **PIVOT)
    tuning = store.read_run()["tuning"]
    assert (tuning["curriculum"], tuning["settle_steps"]) == ("pivot", 1)
    with pytest.raises(UserError, match=r"made with curriculum = 'pivot', not 'sequential'"):
        fits.fit(image, tmp_path / "run")
    with pytest.raises(UserError, match=r"made with settle_steps = 1, not 2"):
        fits.fit(image, tmp_path / "run", **PIVOT, settle_steps=2)


def test_what_was_tuned_at_the_pivots_is_the_run_folders_until_the_picture_is_tuned(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*rest: Any) -> None:
        raise KeyError("the end of the process")

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(RunStore, "save_step", crash)
        fits.fit(image, tmp_path / "run", **PIVOT)
    store = RunStore(tmp_path / "run")
    assert store.done_at_pivots() == {0, 1, 2} and store.done() == set()
    with pytest.raises(UserError, match=r"made with curriculum"):
        fits.fit(image, tmp_path / "run")
    fits.fit(image, tmp_path / "run", **PIVOT)
    assert not (store.folder / "pivot").exists() and store.done() == {0, 1, 2}
    assert fits.tensors(store) == fits.tensors(fits.fit(image, tmp_path / "whole", **PIVOT))


@pytest.mark.parametrize("carry", [True, False])
def test_a_step_that_was_lost_is_made_again_with_what_it_needs(
    carry: bool, image: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**PIVOT, "slots": 2, "carry": carry}
    store = fits.fit(image, tmp_path / "run", **settings)
    whole = fits.tensors(store)
    (store.folder / "steps" / "1.safetensors").unlink()
    fits.fit(image, tmp_path / "run", **settings)
    assert fits.tensors(store) == whole and not (store.folder / "pivot").exists()


def test_a_later_attempt_has_both_passes_with_twice_the_steps(image: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**PIVOT, "slots": 2, "inner_steps": 2, "required_psnr": 99.0}
    store = fits.fit(image, tmp_path / "run", **settings, retries=1)
    record = store.read_run()["reconstruction"]
    assert [attempt["inner_steps_at_most"] for attempt in record["attempts"]] == [2, 4] and record[
        "kept"
    ] == 1
    assert [(info["inner_steps_at_pivot"], info["inner_steps"]) for info in infos(store)] == [(4, 2)] * 3
    left = {path.name for path in store.folder.iterdir()}
    assert not left & {"attempts", "pivot"}


@pytest.mark.parametrize("settings", [{"kv": "replayed"}, {"store_dtype": "int8"}], ids=str)
def test_an_edit_to_the_source_prompt_is_the_reconstruction(
    settings: dict[str, Any], image: Path, tmp_path: Path
) -> None:
    store = fits.fit(image, tmp_path / "run", **PIVOT, slots=3, **settings)
    edited = fits.edit(store, SOURCE, kv=settings.get("kv", "stored"))[0]
    assert fits.levels(edited, fits.opened(store.folder / "reconstruction.png")) <= 2


@pytest.mark.parametrize("at", ["rollout", "pivot"])
def test_a_variant_that_learns_nothing_has_no_pass_at_the_pivots(
    at: str, image: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"attention": partial(Recorded, at=at), "slots": 2}
    pivot = fits.fit(image, tmp_path / "pivot", **settings, **PIVOT)
    sequential = fits.fit(image, tmp_path / "sequential", **settings)
    for i in range(3):
        assert torch.equal(pivot.step(i).z, sequential.step(i).z)
    assert not (pivot.folder / "pivot").exists()


def test_a_dry_run_of_one_phase_keeps_nothing(image: Path, tmp_path: Path) -> None:
    data = SourceImages(str(image), SOURCE, out=str(tmp_path / "run"))
    fits.trainer(fast_dev_run=True).fit(fits.model(**PIVOT, slots=2), datamodule=data)
    assert not RunStore(tmp_path / "run").has_begun()


# --------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("slots", [1, 4])
def test_a_picture_that_runs_away_at_one_timestep_is_given_up_and_the_other_comes_out_the_same(
    slots: int, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {**PIVOT, "slots": slots}
    whole = fit_all(two, tmp_path / "whole", **settings)
    load = Slots._load

    def patched(self: Slots, work: SourceImage) -> Member:
        member = load(self, work)
        if work.name == "a.png":
            member.pivots[1] = float("nan")  # what step 1 is to reach, and step 2 begins at
        return member

    monkeypatch.setattr(Slots, "_load", patched)
    with pytest.raises(SomeFailedError, match="1 of 2 pictures") as raised:
        fit_all(two, tmp_path / "out", **settings)
    ((label, reason),) = raised.value.reasons.items()
    assert Path(label).name == "a.png" and "no longer finite at step 1" in reason
    assert fits.tensors(RunStore(tmp_path / "out" / "b")) == fits.tensors(whole["b"])
    assert RunStore(tmp_path / "out" / "a").done_at_pivots() <= {0}


def test_psi_at_a_pivot_that_is_damaged_is_the_matter_of_its_picture(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RunStore.save_pivot

    def cut(self: RunStore, i: int, *rest: Any) -> None:
        damages = self.folder.name == "a" and i == 1
        save(self, i, *rest[: 3 if damages else None])  # at once, and not in the thread that writes
        if damages:
            file = self.folder / "pivot" / "1.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"x")

    monkeypatch.setattr(RunStore, "save_pivot", cut)
    with pytest.raises(SomeFailedError) as raised:
        fit_all(two, tmp_path / "out", **PIVOT, slots=2)
    ((label, reason),) = raised.value.reasons.items()
    assert Path(label).name == "a.png" and "is damaged" in reason
    assert RunStore(tmp_path / "out" / "b").done() == {0, 1, 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curriculum": "parallel"}, "curriculum: expected sequential or pivot, got 'parallel'"),
        ({"settle_steps": 0}, "settle_steps: expected 1 or more, got 0"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        KVInversion(**settings)
