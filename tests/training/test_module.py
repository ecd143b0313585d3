"""What a fit leaves and an edit reads, through the trainer, against plain torch where that is possible."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import checkpoints
import fits
import pytest
import torch
from by_hand import LR, ByHand
from diffusers.models.attention_processor import AttnProcessor
from fits import SOURCE, TARGET, UNTUNED, fit_all, infos
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch import Tensor, nn

from kvinv_pl.attention import Selection, Site, select, self_attentions
from kvinv_pl.attention.attachment import attach
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.models.stable_diffusion import Backbone
from kvinv_pl.training.datamodule import SourceImages


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """One tuned picture, that of `image`, which tests may edit but not change."""
    return fits.finished(tmp_path_factory.mktemp("runs") / "tuned")


@pytest.fixture(scope="module")
def untuned(image: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return fits.fit(image, tmp_path_factory.mktemp("runs") / "untuned", tolerance=UNTUNED)


def quality(store: RunStore) -> float:
    return store.read_run()["reconstruction"]["psnr_to_round_trip"]


# ---------------------------------------------------------------------------------------------- tuning


@pytest.mark.parametrize("carry", [True, False])
def test_a_fit_equals_a_plain_loop_with_a_fresh_adam_for_every_timestep(
    carry: bool, image: Path, tmp_path: Path
) -> None:
    store = fits.fit(image, tmp_path / "run", carry=carry, inner_steps=4)
    by_hand = ByHand(image)
    psi, z, losses = by_hand.tune(4, carry)
    torch.testing.assert_close(store.trajectory(), torch.cat(by_hand.pivots), rtol=0, atol=1e-6)
    for i in range(3):
        step = store.step(i)
        assert step.psi.keys() == psi[i].keys() and len(step.psi) == 6 * len(by_hand_sites(step.psi))
        torch.testing.assert_close(step.z, z[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(
            step.psi, {name: value[0] for name, value in psi[i].items()}, rtol=0, atol=1e-5
        )
        assert step.info["loss_start"] == pytest.approx(losses[i][0], rel=1e-4)
        assert step.info["inner_steps"] == 4


def by_hand_sites(psi: dict[str, Tensor]) -> set[str]:
    return {name.rpartition(".")[0] for name in psi}


def test_tuning_lowers_equation_3_at_every_timestep_and_the_reconstruction_gains_by_it(
    untuned: RunStore, image: Path, tmp_path: Path
) -> None:
    tuned = fits.fit(image, tmp_path / "run", inner_steps=15)
    assert all(info["loss_end"] < info["loss_start"] and info["inner_steps"] == 15 for info in infos(tuned))
    assert all(info["loss_end"] == info["loss_start"] and info["inner_steps"] == 0 for info in infos(untuned))
    assert quality(tuned) > quality(untuned) + 10
    last_errors = [(store.step(2).z - store.trajectory()[0]).square().mean() for store in (tuned, untuned)]
    assert last_errors[0] < last_errors[1] / 10


def test_z_tilde_is_what_the_stored_psi_makes_of_the_step_before(image: Path, tmp_path: Path) -> None:
    """Disk and memory agree in half precision too: psi is rounded before it advances z-tilde."""
    store, by_hand = fits.fit(image, tmp_path / "run", store_dtype="float16"), ByHand(image)
    sites = select(self_attentions(by_hand.backbone.unet, (8, 8)), Selection("decoder"))
    psi = {site.path: FullKV(site) for site in sites}
    attachment, z = attach(by_hand.backbone.unet, psi), store.trajectory()[-1]
    for i in range(3):
        step = store.step(i)
        assert {value.dtype for value in step.psi.values()} == {torch.float16}
        with torch.no_grad():
            for name, value in step.psi.items():
                path, _, key = name.rpartition(".")
                getattr(psi[path], key).copy_(value)
            with attachment.blend():
                z = by_hand.guided(z[None], i, by_hand.source)[0]
        torch.testing.assert_close(step.z, z, rtol=0, atol=1e-5)


def test_a_phase_stops_at_the_inner_step_at_which_it_has_converged(image: Path, tmp_path: Path) -> None:
    _, _, losses = ByHand(image).tune(6, carry=True)
    assert losses[0] == sorted(losses[0], reverse=True)
    tolerance = (losses[0][2] + losses[0][3]) / 2
    first = infos(fits.fit(image, tmp_path / "run", inner_steps=6, tolerance=tolerance))[0]
    assert first["inner_steps"] == 3
    assert first["loss_end"] == pytest.approx(losses[0][3], rel=1e-4)


def test_the_tolerance_grows_by_tolerance_growth_with_every_step(
    image: Path, untuned: RunStore, tmp_path: Path
) -> None:
    starts = [info["loss_start"] for info in infos(untuned)]
    growth = max(starts) * 1.01  # too much for step 0, whose tolerance is 0, and enough for all later ones
    store = fits.fit(image, tmp_path / "run", tolerance_growth=growth)
    assert [info["inner_steps"] for info in infos(store)] == [3, 0, 0]


def test_a_step_without_effect_is_not_tuned(image: Path, tmp_path: Path) -> None:
    checkpoint = fits.checkpoint(steps_offset=0, set_alpha_to_one=False)
    store = fits.fit(image, tmp_path / "run", checkpoint=str(checkpoint))
    assert [info["inner_steps"] for info in infos(store)] == [3, 3, 0]
    assert torch.equal(store.step(2).z, store.step(1).z)
    assert len(fits.edit(store, checkpoint=str(checkpoint))) == 1


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.LBFGS, lr=0.5, max_iter=3),
        partial(torch.optim.SGD, lr=0.5, momentum=0.9),
        partial(torch.optim.AdamW, lr=0.05),
    ],
    ids=["LBFGS", "SGD", "AdamW"],
)
def test_any_torch_optimiser_tunes(optimizer: Any, image: Path, untuned: RunStore, tmp_path: Path) -> None:
    store = fits.fit(image, tmp_path / "run", optimizer=optimizer)
    assert infos(store)[0]["loss_end"] < infos(untuned)[0]["loss_end"] * 0.95
    assert all(info["inner_steps"] == 3 for info in infos(store))


class Counting(torch.optim.SGD):
    """Keeps a count in its group, as schedule-free optimisers do, and slows down with it."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] = LR / group["count"]
        super().step(closure)


def test_an_optimiser_that_keeps_its_state_in_its_groups_is_new_at_every_timestep(
    image: Path, tmp_path: Path
) -> None:
    """Otherwise a run that goes on would differ from one that was never stopped."""
    settings: dict[str, Any] = {"optimizer": lambda p: Counting(p, lr=LR), "carry": False}
    whole = fits.fit(image, tmp_path / "whole", **settings)
    stopped = fits.fit(image, tmp_path / "stopped", **settings)
    for i in (1, 2):
        (stopped.folder / "steps" / f"{i}.safetensors").unlink()
    fits.fit(image, tmp_path / "stopped", **settings)
    assert fits.tensors(stopped) == fits.tensors(whole)


class Buffered(FullKV):
    """Counts how often it was run in a buffer, and notes its start in another that is not kept."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(site.slots, 1, 1))
        self.register_buffer("scratch", torch.zeros(7), persistent=False)

    def reset(self, generator: torch.Generator | None = None) -> None:
        super().reset(generator)
        if "seen" in self._buffers:  # which it is not yet when FullKV makes it
            self.seen.zero_()

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += 1
        return super().forward(k, v)


def test_a_buffer_of_a_variant_is_reset_kept_and_read_like_its_parameters(
    image: Path, tmp_path: Path
) -> None:
    store = fits.fit(image, tmp_path / "run", attention=Buffered, carry=False)
    for i in range(3):
        seen = {name: value for name, value in store.step(i).psi.items() if name.endswith(".seen")}
        assert seen and not any("scratch" in name for name in store.step(i).psi)
        assert all(value.item() in (3.0, 4.0) for value in seen.values())  # the inner steps of this one alone
    module = fits.model(attention=Buffered)
    module.load_backbone(torch.float32)
    module.denoiser.place((8, 8), 1)
    module.denoiser.read(store.step(1).psi, slot=0)
    torch.testing.assert_close(
        {name: value[0] for name, value in module.denoiser.values().items()}, store.step(1).psi
    )


class Loud(FullKV):
    """Makes V-bar larger than half precision holds, where it hardly matters, and psi not."""

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k_bar, v_bar = super().forward(k, v)
        return k_bar, v_bar * 1e6


def test_k_bar_or_v_bar_that_the_store_cannot_hold_is_refused_and_leaves_no_phase(
    image: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"attention": Loud, "tolerance": UNTUNED}
    with pytest.raises(
        UserError,
        match=r"up_blocks.*attn1\.v: expected values within 65504.*float16.*use store_dtype bfloat16",
    ):
        fits.fit(image, tmp_path / "run", store_dtype="float16", **settings)
    assert not RunStore(tmp_path / "run").done()
    assert fits.fit(image, tmp_path / "run", store_dtype="bfloat16", **settings).done() == {0, 1, 2}


def test_an_optimiser_that_would_couple_pictures_is_refused_side_by_side(image: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="LBFGS would share its steps between pictures side by side: use slots 1"
    ):
        fits.fit(image, tmp_path / "run", optimizer=torch.optim.LBFGS, slots=2)


def test_a_learning_rate_that_runs_away_is_refused_and_leaves_no_phase(image: Path, tmp_path: Path) -> None:
    for inner_steps in (1, 3):
        with pytest.raises(UserError, match="no longer finite at step 0: use a lower learning rate"):
            fits.fit(
                image, tmp_path / "run", optimizer=partial(torch.optim.SGD, lr=1e38), inner_steps=inner_steps
            )
        assert RunStore(tmp_path / "run").done() == set()


def test_settings_may_change_until_the_first_phase_is_done_and_not_after(image: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no longer finite"):
        fits.fit(image, tmp_path / "run", optimizer=partial(torch.optim.SGD, lr=1e38))
    store = fits.fit(image, tmp_path / "run")
    assert store.done() == {0, 1, 2}
    with pytest.raises(UserError, match=r"made with inner_steps = 3, not 4"):
        fits.fit(image, tmp_path / "run", inner_steps=4)


# -------------------------------------------------------------------------- where psi starts


def start_of(image: Path, out: Path, **settings: Any) -> dict[str, Tensor]:
    """Psi of step 0 where nothing is tuned."""
    return fits.fit(image, out, tolerance=UNTUNED, **settings).step(0).psi


def test_a_random_start_depends_on_seed_and_picture_and_not_on_who_is_tuned_beside_it(
    image: Path, tmp_path: Path
) -> None:
    noise: Callable[[Site], FullKV] = partial(FullKV, start="noise", noise_std=0.1)
    alone = start_of(image, tmp_path / "alone", attention=noise, seed=5)
    again = start_of(image, tmp_path / "again", attention=noise, seed=5)
    other = start_of(image, tmp_path / "other", attention=noise, seed=6)
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "b.png").write_bytes(image.read_bytes())
    fits.picture(folder / "a.png", seed=1)
    module = fits.model(tolerance=UNTUNED, attention=noise, seed=5, slots=2)
    fits.trainer().fit(module, datamodule=SourceImages(str(folder), SOURCE, out=str(tmp_path / "pair")))
    beside, neighbour = [RunStore(tmp_path / "pair" / name).step(0).psi for name in ("b", "a")]
    for name in (key for key in alone if key.endswith("k_hat")):
        assert alone[name].std() == pytest.approx(0.1, rel=0.2)
        assert torch.equal(alone[name], again[name])
        assert torch.equal(alone[name], beside[name])
        assert not torch.equal(alone[name], other[name])
        assert not torch.equal(alone[name], neighbour[name])


def test_random_starts_of_layers_and_timesteps_are_unlike(image: Path, tmp_path: Path) -> None:
    noise: Callable[[Site], FullKV] = partial(FullKV, start="noise")
    store = fits.fit(image, tmp_path / "run", attention=noise, tolerance=UNTUNED, carry=False)
    starts = [
        value.flatten()[:64] for i in range(3) for name, value in store.step(i).psi.items() if "_hat" in name
    ]
    assert len({tuple(start.tolist()) for start in starts}) == len(starts)


def test_the_source_start_is_the_sources_own_k_and_v_of_the_conditional_branch(
    image: Path, tmp_path: Path
) -> None:
    psi = start_of(image, tmp_path / "run", attention=partial(FullKV, start="source"))
    by_hand, seen = ByHand(image), dict[str, Tensor]()

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, out: seen.update({name: out[0]})

    for path in by_hand_sites(psi):
        layer = by_hand.backbone.unet.get_submodule(path)
        for key in ("k", "v"):
            layer.get_submodule(f"to_{key}").register_forward_hook(keep(f"{path}.{key}_hat"))
    with torch.no_grad():
        by_hand.backbone.predict(by_hand.pivots[-1], by_hand.table.timesteps[:1], by_hand.source)
    assert len(seen) == 2 * len(by_hand_sites(psi))
    for name, value in seen.items():
        torch.testing.assert_close(psi[name], value, rtol=0, atol=1e-5)
    assert {value.item() for name, value in psi.items() if "lambda" in name} == {0.0}
    assert {value.item() for name, value in psi.items() if "gamma" in name} == {1.0}


# ---------------------------------------------------------------------------------- side by side


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fits.pictures(tmp_path_factory.mktemp("three"), "abc")


@pytest.mark.parametrize("carry", [True, False])
def test_two_by_two_three_pictures_come_out_as_one_by_one_and_padding_writes_nothing(
    carry: bool, three: Path, tmp_path: Path
) -> None:
    pairs = fit_all(three, tmp_path / "pairs", slots=2, carry=carry, steps=2)
    singly = fit_all(three, tmp_path / "singly", slots=1, carry=carry, steps=2)
    assert [*pairs] == [*singly] == ["a", "b", "c"]
    for name in "abc":
        assert pairs[name].done() == {0, 1}
        for i in range(2):
            torch.testing.assert_close(pairs[name].step(i).z, singly[name].step(i).z, rtol=0, atol=2e-3)
        assert quality(pairs[name]) == pytest.approx(quality(singly[name]), abs=0.2)


def test_a_slot_that_has_converged_keeps_psi_while_the_other_goes_on(tmp_path: Path) -> None:
    for seed, name in {0: "a", 3: "b"}.items():  # the second is further from converging
        fits.picture(tmp_path / "two" / f"{name}.png", seed=seed)
    first, _ = ByHand(tmp_path / "two" / "a.png", steps=2).tune(5, carry=True)[2]
    settings: dict[str, Any] = {"steps": 2, "inner_steps": 5, "tolerance": (first[2] + first[3]) / 2}
    singly = fit_all(tmp_path / "two", tmp_path / "singly", slots=1, **settings)
    pairs = fit_all(tmp_path / "two", tmp_path / "pairs", slots=2, **settings)
    used = {name: infos(store)[0]["inner_steps"] for name, store in singly.items()}
    assert used == {"a": 3, "b": 5}
    for name in "ab":
        assert [info["inner_steps"] for info in infos(pairs[name])] == [
            info["inner_steps"] for info in infos(singly[name])
        ]
        torch.testing.assert_close(pairs[name].step(0).psi, singly[name].step(0).psi, rtol=0, atol=2e-3)


def test_pictures_of_unlike_size_are_fitted_in_one_go_each_on_its_own_grid(tmp_path: Path) -> None:
    for name, size in {"wide": (32, 16), "square": (16, 16), "tall": (16, 24)}.items():
        fits.picture(tmp_path / "pictures" / f"{name}.png", size)
    stores = fit_all(tmp_path / "pictures", tmp_path / "out", slots=2, steps=2, inner_steps=2)
    shapes = {name: tuple(store.trajectory().shape[-2:]) for name, store in stores.items()}
    assert shapes == {"square": (8, 8), "tall": (12, 8), "wide": (8, 16)}
    editor = fits.model(steps=2)
    for store in stores.values():
        assert store.done() == {0, 1}
        assert fits.edit(store, module=editor)[0].size == fits.opened(store.folder / "source.png").size


# ------------------------------------------------------------------------------------------ masks


class Bound(FullKV):
    """A variant that takes a mask, and says with which it worked."""

    worked_with: list[Tensor | None] = []  # noqa: RUF012

    def bind(self, mask: Tensor | None) -> None:
        self.mask = mask

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sdpa: Any) -> Tensor:
        self.worked_with.append(self.mask)
        return sdpa(q, k, v)


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    left = Image.new("L", (16, 16))
    left.paste(255, (0, 0, 8, 16))
    left.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_a_mask_reaches_variants_that_take_one_in_fit_and_edit(
    image: Path, mask: Path, tmp_path: Path
) -> None:
    def check(slots: int) -> None:
        assert Bound.worked_with
        for seen in Bound.worked_with:
            assert seen is not None and seen.shape == (slots, 16, 16)
            assert (seen[:, :, :8] == 1).all() and (seen[:, :, 8:] == 0).all()
        Bound.worked_with.clear()

    module = fits.model(attention=Bound, slots=2)
    data = SourceImages(str(image), SOURCE, [TARGET], mask=str(mask), out=str(tmp_path / "run"))
    fits.trainer().fit(module, datamodule=data)
    check(slots=2)
    fits.edit(RunStore(tmp_path / "run"), module=module)
    check(slots=1)


def test_a_mask_for_a_variant_that_takes_none_is_refused(image: Path, mask: Path, tmp_path: Path) -> None:
    data = SourceImages(str(image), SOURCE, mask=str(mask), out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="a mask was given, but FullKV takes none"):
        fits.trainer().fit(fits.model(), datamodule=data)


# ---------------------------------------------------------------------------------------- editing


@pytest.mark.parametrize("reading", ["frozen", "blend"])
def test_an_edit_to_the_source_prompt_at_the_tuned_guidance_is_the_reconstruction(
    reading: Literal["frozen", "blend"], tuned: RunStore, untuned: RunStore
) -> None:
    for store in (tuned, untuned):
        edited = fits.edit(store, SOURCE, reading=reading, start=0.0)[0]
        assert fits.levels(edited, fits.opened(store.folder / "reconstruction.png")) <= 1


def test_the_readings_and_the_start_matter_for_a_target(tuned: RunStore) -> None:
    made = [
        fits.edit(tuned, reading=reading, start=start)[0].tobytes()
        for reading, start in (("frozen", 0.0), ("blend", 0.0), ("frozen", 0.4), ("frozen", 1.0))
    ]
    assert len(set(made)) == 4


def test_with_nothing_learned_frozen_still_reads_the_sources_k_and_v(untuned: RunStore) -> None:
    frozen, blend, plain = (
        fits.edit(untuned, reading=reading, start=start)[0]
        for reading, start in (("frozen", 0.0), ("blend", 0.0), ("blend", 1.0))
    )
    assert frozen.tobytes() != plain.tobytes()
    assert blend.tobytes() == plain.tobytes()  # psi is the identity


@pytest.mark.parametrize("reading", ["frozen", "blend"])
def test_a_start_of_one_is_the_plain_ddim_edit_bit_for_bit(
    reading: Literal["frozen", "blend"], tuned: RunStore, image: Path
) -> None:
    assert fits.edit(tuned, reading=reading, start=1.0)[0].tobytes() == ByHand(image).plain_edit().tobytes()


@pytest.mark.parametrize("reading", ["frozen", "blend"])
def test_several_targets_in_one_call_come_out_as_one_by_one(
    reading: Literal["frozen", "blend"], tuned: RunStore
) -> None:
    targets = ["a cat running", "a dog sitting on the grass", "a red horse"]
    together = fits.edit(tuned, *targets, reading=reading, start=0.3)
    for target, picture in zip(targets, together, strict=True):
        assert fits.levels(fits.edit(tuned, target, reading=reading, start=0.3)[0], picture) <= 1
    assert len({picture.tobytes() for picture in together}) == 3


def test_a_negative_prompt_changes_the_edit(tuned: RunStore) -> None:
    assert fits.edit(tuned, negative="a red dog")[0].tobytes() != fits.edit(tuned)[0].tobytes()


def test_a_second_edit_tunes_nothing_again(tuned: RunStore) -> None:
    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (tuned.folder / "steps").iterdir()}

    before = times()
    fits.edit(tuned, "a dog jumping")
    fits.edit(tuned, "a dog jumping", guidance=3.0)
    assert times() == before and len(before) == 3


def test_an_edit_says_that_it_is_made_at_another_guidance_than_tuned(tuned: RunStore, capsys: Any) -> None:
    data = SourceImages(run=str(tuned.folder), targets=[TARGET])
    fits.trainer(quiet=False).edit(fits.model(guidance=3.0), data)
    assert "tuned at guidance 2, edited at 3" in capsys.readouterr().err


def test_an_edit_with_another_variant_than_tuned_is_refused(tuned: RunStore) -> None:
    with pytest.raises(UserError, match=r"made with attention\.scale = 'layer', not 'head'"):
        fits.edit(tuned, attention=partial(FullKV, scale="head"))
    with pytest.raises(UserError, match=r"made with (other|another) target_modules"):
        fits.edit(tuned, target_modules="all")


def test_a_picture_that_is_not_tuned_to_the_end_is_not_edited(tmp_path: Path) -> None:
    store = fits.finished(tmp_path / "run")
    (tmp_path / "run" / "steps" / "1.safetensors").unlink()
    with pytest.raises(UserError, match="not tuned to the end: resume it with `kvinv fit`"):
        fits.edit(store)


@pytest.mark.parametrize("reading", ["frozen", "blend"])
def test_tuned_at_guidance_one_a_single_branch_is_stored_and_serves_both_of_an_edit(
    reading: Literal["frozen", "blend"], image: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"tuning_guidance": 1.0, "reading": reading, "start": 0.0}
    store = fits.fit(image, tmp_path / "run", **settings)
    kv = store.step(0).kv
    assert kv is not None and {k.shape[0] for pair in kv.values() for k in pair} == {1}
    one, two = fits.edit(store, TARGET, "a dog", **settings)
    assert one.tobytes() != two.tobytes()
    same = fits.edit(store, SOURCE, **settings, guidance=1.0)[
        0
    ]  # one prompt: both branches agree with tuning's
    assert fits.levels(same, fits.opened(store.folder / "reconstruction.png")) <= 1


def test_tuned_with_guidance_both_branches_are_stored_uncond_then_cond(
    tuned: RunStore, untuned: RunStore
) -> None:
    kv = tuned.step(1).kv
    assert kv is not None
    for site in select(
        self_attentions(Backbone.load(str(fits.checkpoint())).unet, (8, 8)), Selection("decoder")
    ):
        k, v = kv.pop(site.path)
        assert k.shape == v.shape == (2, site.tokens, site.dim)
        assert not torch.equal(k[0], k[1])
    assert not kv


def test_an_empty_source_prompt_is_a_prompt(image: Path, tmp_path: Path) -> None:
    module = fits.model()
    data = SourceImages(str(image), "", [TARGET], out=str(tmp_path / "run"))
    fits.trainer().run(module, data)
    assert RunStore(tmp_path / "run").read_run()["source"] == ""
    assert len(module.last_edits) == 1


def test_inverting_at_another_guidance_gives_another_trajectory(
    tuned: RunStore, image: Path, tmp_path: Path
) -> None:
    module = fits.model(inversion_guidance=3.0, negative="a dog")
    fits.trainer().invert(module, SourceImages(str(image), SOURCE, out=str(tmp_path / "run")))
    store = RunStore(tmp_path / "run")
    assert torch.equal(store.trajectory()[0], tuned.trajectory()[0])
    assert not torch.allclose(store.trajectory()[-1], tuned.trajectory()[-1], atol=1e-3)
    assert store.read_run()["inversion"] == {"guidance": 3.0, "negative": "a dog"}


# ------------------------------------------------------------------------------------ the U-Net


def test_two_runs_of_unlike_grid_on_one_loaded_model_do_not_touch_each_other(
    tmp_path: Path, tuned: RunStore
) -> None:
    wide, module = fits.picture(tmp_path / "wide.png", (32, 16)), fits.model()
    store = fits.fit(wide, tmp_path / "wide", module)
    loaded = module.load_backbone(torch.float32)
    before = fits.edit(store, module=module)[0]
    square = fits.edit(tuned, module=module)[0]
    assert fits.edit(store, module=module)[0].tobytes() == before.tobytes()
    assert square.tobytes() == fits.edit(tuned)[0].tobytes()
    assert module.load_backbone(torch.float32) is loaded


def test_a_processor_that_something_else_replaced_is_noticed_before_a_phase_and_an_edit(
    image: Path, tmp_path: Path
) -> None:
    module = fits.model()
    store = fits.fit(image, tmp_path / "run", module)
    module.load_backbone(torch.float32).unet.set_attn_processor(AttnProcessor())
    with pytest.raises(UserError, match="CP-attn was replaced in"):
        fits.edit(store, module=module)


# --------------------------------------------------------------------------------- kinds of models


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_every_kind_of_stable_diffusion_goes_all_the_way_with_a_picture_that_is_not_square(
    kind: checkpoints.Kind, tmp_path: Path
) -> None:
    checkpoint = checkpoints.make(kind, tmp_path)
    # small pictures, for speed; a version of diffusers that is believed
    checkpoints.change_json(checkpoint / "unet" / "config.json", sample_size=8, _diffusers_version="0.30.0")
    image = fits.picture(tmp_path / "cat.png", (150, 100))
    module = fits.model(checkpoint=str(checkpoint), steps=2, inner_steps=2)
    fits.trainer().run(module, SourceImages(str(image), SOURCE, [TARGET], out=str(tmp_path / "run")))
    store = RunStore(tmp_path / "run")
    run = store.read_run()
    assert run["scheduler"]["prediction"] == ("v_prediction" if kind == "sd21" else "epsilon")
    assert store.trajectory().shape == (3, 4, 8, 16)
    assert all(info["loss_end"] < info["loss_start"] for info in infos(store)[:1])
    assert fits.opened(module.last_edits[0]).size == (150, 100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected 1 or more, got 0"),
        ({"inner_steps": -1}, "inner_steps: expected 1 or more"),
        ({"slots": 0}, "slots: expected 1 or more"),
        ({"guidance": float("nan")}, "guidance: expected a finite number of 0 or more, got nan"),
        ({"tuning_guidance": -1.0}, "tuning_guidance: expected"),
        ({"inversion_guidance": float("inf")}, "inversion_guidance: expected"),
        ({"start": 1.5}, "start: expected a share of the steps, 0 to 1, got 1.5"),
        ({"start": float("nan")}, "start: expected"),
        ({"reading": "both"}, "reading: expected frozen or blend, got 'both'"),
        ({"store_dtype": "int4"}, "store_dtype: expected float16, bfloat16, float32, int8, got 'int4'"),
        ({"tolerance": -1.0}, "tolerance: expected a mean squared error of 0 or more, got -1.0"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fits.model(**settings)
