"""What an edit reads, from every shipped variant: both readings, K-bar and V-bar stored and replayed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fits
import numpy as np
import pytest
import torch
from fits import SOURCE, TARGET
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]
from kvinv_plugins.low_rank import LowRank  # pyright: ignore[reportMissingImports]
from kvinv_plugins.recorded import Recorded  # pyright: ignore[reportMissingImports]
from kvinv_plugins.v_only import VOnly  # pyright: ignore[reportMissingImports]
from PIL import Image

from kvinv_pl.attention import CPAttention, Site
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.training.module import KVInversion

Make = Callable[[Site], CPAttention]
MAKES: dict[str, Make] = {
    "full_kv": FullKV,
    "v_only": VOnly,
    "low_rank": partial(LowRank, rank=2),
    "recorded": Recorded,
    "recorded_at_pivot": partial(Recorded, at="pivot"),
}
LEARNING = ("full_kv", "v_only", "low_rank")


Tuned = Callable[..., tuple[KVInversion, RunStore]]


@pytest.fixture(scope="module")
def tuned(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A variant's module and its run, tuned once; tests may edit it but not change it."""
    made: dict[tuple[Any, ...], tuple[KVInversion, RunStore]] = {}

    def get(name: str, **settings: Any) -> tuple[KVInversion, RunStore]:
        key = (name, *sorted(settings.items()))
        if key not in made:
            module = fits.model(attention=MAKES[name], **settings)
            made[key] = module, fits.fit(image, tmp_path_factory.mktemp("runs") / "run", module)
        return made[key]

    return get


def edit(module: KVInversion, store: RunStore, *targets: str, **settings: Any) -> list[Image.Image]:
    return fits.edit(store, *targets, module=module, **settings)


def unlike(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


GUIDANCES = [(2.0, None), (1.0, None), (2.0, 2.0), (1.0, 1.0), (2.0, 1.0)]


@pytest.mark.parametrize(
    ("name", "guidance", "source_guidance"),
    [
        # what the branches of a step are is nothing that a variant sees: each has two of these, one all
        *(("full_kv", *guidances) for guidances in GUIDANCES),
        *((name, *GUIDANCES[0]) for name in MAKES if name != "full_kv"),
        *(("v_only", *GUIDANCES[1]), ("low_rank", *GUIDANCES[4])),
        *(("recorded", *GUIDANCES[3]), ("recorded_at_pivot", *GUIDANCES[2])),
    ],
)
def test_replayed_reads_what_stored_reads(
    name: str, guidance: float, source_guidance: float | None, tuned: Tuned
) -> None:
    """Latents, and not only pictures, to float tolerance; from every start, and for several edits at once."""
    module, store = tuned(name, tuning_guidance=guidance)
    assert store.step(0).kv
    seen: list[torch.Tensor] = []
    decode = module.denoiser.backbone.decode

    def noted(z: torch.Tensor) -> torch.Tensor:
        seen.append(z)
        return decode(z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.denoiser.backbone, "decode", noted)
        for start in (0.0, 0.5):
            for kv in ("stored", "replayed"):
                edit(module, store, TARGET, "a red dog", kv=kv, start=start, source_guidance=source_guidance)
    for stored, replayed in (seen[:2], seen[2:]):
        torch.testing.assert_close(replayed, stored, rtol=0, atol=2e-5)
    assert (seen[0] - seen[2]).abs().max() > 0.02  # where reading begins does matter


@pytest.mark.parametrize("name", MAKES)
def test_an_edit_to_the_source_prompt_from_the_start_is_the_reconstruction(name: str, tuned: Tuned) -> None:
    """Also where K and V are the pivot's: what is reported as the reconstruction is what edits arrive at."""
    module, store = tuned(name, tuning_guidance=2.0)
    reconstruction = fits.opened(store.folder / "reconstruction.png")
    unguided = {"source_guidance": 2.0, "guidance": 7.0}  # there is no change of words to guide
    for kv, change in (("stored", {}), ("stored", unguided), ("replayed", unguided)):
        (picture,) = edit(module, store, SOURCE, kv=kv, start=0.0, **change)
        assert unlike(picture, reconstruction) <= 1


@pytest.mark.parametrize("name", LEARNING)
def test_what_learns_comes_nearer_to_the_pivot_and_means_something_in_both_readings(
    name: str, tuned: Tuned
) -> None:
    module, store = tuned(name, tuning_guidance=2.0)
    for i in range(3):
        info = store.step_info(i)
        assert info["loss_end"] < info["loss_start"] and info["inner_steps"] == 3
    plain, frozen, blend = (
        edit(module, store, start=start, reading=reading)[0]
        for start, reading in ((1.0, "frozen"), (0.0, "frozen"), (0.0, "blend"))
    )
    assert unlike(frozen, plain) > 1 and unlike(blend, plain) > 1 and unlike(frozen, blend) > 1


@pytest.mark.parametrize("name", ["recorded", "recorded_at_pivot"])
def test_what_learns_nothing_has_no_inner_steps_and_changes_an_edit_all_the_same(
    name: str, tuned: Tuned
) -> None:
    module, store = tuned(name, tuning_guidance=2.0)
    run = store.read_run()
    assert run["tuning"]["optimizer"] is None and run["tuning"]["inner_steps"] == 0
    assert run["reconstruction"]["inner_steps"] == 0
    assert all(not store.step(i).psi for i in range(3))
    assert unlike(edit(module, store, start=0.0)[0], edit(module, store, start=1.0)[0]) > 1


def test_recorded_at_the_pivot_takes_k_and_v_at_the_pivot_and_rolls_z_tilde_out_with_them(
    tuned: Tuned,
) -> None:
    module, pivot = tuned("recorded_at_pivot", tuning_guidance=2.0)
    rollout = tuned("recorded", tuning_guidance=2.0)[1]
    denoiser, backbone = module.denoiser, module.denoiser.backbone
    attachment = denoiser.place((8, 8), 1)
    contexts = backbone.embed(["", SOURCE])[:, None]
    for i, pivot_z in enumerate(pivot.trajectory().flip(0)[:3]):
        with attachment.observing() as own, torch.no_grad():
            denoiser.branches(pivot_z[None], denoiser.table.timesteps[i][None], contexts)
        for path, (k, v) in (pivot.step(i).kv or {}).items():
            torch.testing.assert_close((k, v), (own[path][0][:, 0], own[path][1][:, 0]), rtol=0, atol=1e-5)
    # at the first step z-tilde is the pivot, after it not
    assert torch.allclose(pivot.step(0).z, rollout.step(0).z, atol=1e-5)
    assert not torch.allclose(pivot.step(2).z, rollout.step(2).z, atol=1e-5)
    quality = [store.read_run()["reconstruction"]["psnr_to_round_trip"] for store in (pivot, rollout)]
    assert quality[0] < 60  # nobody tuned it: a roll-out, not the pivot itself


@pytest.mark.parametrize("at", ["rollout", "pivot"])
def test_recorded_refuses_blend_before_any_work(at: Any, image: Path, tmp_path: Path, tuned: Tuned) -> None:
    says = "reading: expected frozen, got blend: with Recorded nothing is learned, so it would be plain DDIM"
    with pytest.raises(UserError, match=says):
        fits.fit(image, tmp_path / "run", attention=partial(Recorded, at=at), reading="blend")
    assert not (tmp_path / "run").exists()
    name = "recorded" if at == "rollout" else "recorded_at_pivot"
    module, store = tuned(name, tuning_guidance=2.0)
    with pytest.raises(UserError, match=says):
        edit(module, store, reading="blend")


@pytest.mark.parametrize("name", ["full_kv", "low_rank", "recorded_at_pivot"])
def test_with_kv_replayed_psi_alone_is_on_disk(name: str, image: Path, tmp_path: Path, tuned: Tuned) -> None:
    module, stored = tuned(name, tuning_guidance=2.0)
    small = fits.fit(image, tmp_path / "run", attention=MAKES[name], kv="replayed", tuning_guidance=2.0)
    assert (small.read_run()["tuning"]["kv"], stored.read_run()["tuning"]["kv"]) == ("replayed", "stored")
    sites = [cp.site for cp in module.denoiser.cps]
    bars = sum(2 * 2 * site.tokens * site.dim * 4 for site in sites)  # K and V, two branches, float32
    for i in range(3):
        step = small.step(i)
        assert step.kv is None
        torch.testing.assert_close((step.psi, step.z), (stored.step(i).psi, stored.step(i).z), rtol=0, atol=0)
        sizes = [(run.folder / "steps" / f"{i}.safetensors").stat().st_size for run in (stored, small)]
        names = 2 * len(sites) * 200  # what the header says of each tensor
        assert bars <= sizes[0] - sizes[1] <= bars + names
    (picture,) = fits.edit(small, module=fits.model(attention=MAKES[name], kv="replayed"))
    assert unlike(picture, edit(module, stored)[0]) <= 1
    with pytest.raises(UserError, match="has psi only, without K-bar and V-bar: edit it with kv replayed"):
        edit(module, small)
    with pytest.raises(UserError, match="made with kv = 'replayed', not 'stored'"):
        fits.fit(image, tmp_path / "run", attention=MAKES[name], tuning_guidance=2.0)


def test_replayed_uses_psi_as_it_is_stored(image: Path, tmp_path: Path) -> None:
    """Rounded: an edit in another process has nothing else."""
    settings: dict[str, Any] = {"attention": MAKES["full_kv"], "store_dtype": "bfloat16", "kv": "replayed"}
    module = fits.model(**settings)
    store = fits.fit(image, tmp_path / "run", module)
    (here,), (elsewhere,) = edit(module, store), fits.edit(store, module=fits.model(**settings))
    assert unlike(here, elsewhere) == 0


def test_n_edits_replayed_cost_n_plus_one(tuned: Tuned) -> None:
    """Rows of the U-Net in a step: two for each edit, and two for the source that all of them share."""
    module, store = tuned("full_kv", tuning_guidance=2.0)
    rows: list[int] = []
    hook = module.denoiser.backbone.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        edit(module, store, TARGET, "a dog", "a horse", kv="replayed", start=0.4)
    finally:
        hook.remove()
    assert rows == [6, 8, 8]


@pytest.mark.parametrize("name", ["low_rank", "recorded_at_pivot"])
def test_two_runs_in_one_process_do_not_see_each_other(name: str, image: Path, tmp_path: Path) -> None:
    """Of one loaded model, one after the other, and of two at once."""
    other = fits.picture(tmp_path / "other.png", seed=3)
    module, second = (fits.model(attention=MAKES[name]) for _ in range(2))
    first = fits.fit(image, tmp_path / "a", module)
    between = fits.fit(other, tmp_path / "b", module)
    again = fits.fit(image, tmp_path / "c", module)
    beside = fits.fit(other, tmp_path / "d", second)
    assert fits.tensors(first) == fits.tensors(again) != fits.tensors(between) == fits.tensors(beside)
    before = np.asarray(edit(module, first)[0])
    edit(second, beside)
    assert (np.asarray(edit(module, first)[0]) == before).all()


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 1), (2.0, 2)])
def test_an_edit_at_guidance_one_runs_one_branch(guidance: float, rows: int, tuned: Tuned) -> None:
    module, store = tuned("full_kv")
    unet, seen = module.denoiser.backbone.unet, list[int]()
    hook = unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        edit(module, store, TARGET, guidance=guidance)
    finally:
        hook.remove()
    assert seen == [rows] * 3
