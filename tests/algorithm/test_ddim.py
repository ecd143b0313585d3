"""algorithm.ddim against diffusers' schedulers, and against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler

from kvinv_pl.algorithm.ddim import StepTable, from_v, move, noised, true_v
from kvinv_pl.errors import UserError

SD: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "thresholding": False,
}
SHAPE = (2, 4, 3, 5)


def scheduler_and_table(steps: int, **config: Any) -> tuple[DDIMScheduler, StepTable]:
    scheduler = DDIMScheduler(**SD, **config)
    scheduler.set_timesteps(steps)
    final = scheduler.final_alpha_cumprod
    return scheduler, StepTable.through(scheduler.timesteps[:steps], scheduler.alphas_cumprod, final)


def inverse_scheduler(config: dict[str, Any]) -> DDIMInverseScheduler:
    betas = {key: value for key, value in SD.items() if key != "thresholding"}
    return DDIMInverseScheduler(**betas, **config)


def noise(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def chains(scheduler: DDIMScheduler, i: int) -> bool:
    """Whether diffusers' own step at i arrives where the next one starts."""
    t = int(scheduler.timesteps[i]) - 1000 // len(scheduler.timesteps)
    return t == int(scheduler.timesteps[i + 1]) if i + 1 < len(scheduler.timesteps) else t < 0


spacings = pytest.mark.parametrize(
    ("spacing", "steps"),
    [("leading", n) for n in (10, 30, 50, 70, 100)]
    + [("trailing", n) for n in (10, 25, 50, 100)]
    + [("linspace", n) for n in (10, 50, 100)],
)
ends = pytest.mark.parametrize("one", [True, False], ids=["to_one", "to_alpha_0"])
offsets = pytest.mark.parametrize("offset", [0, 1])
kinds = pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])


@spacings
@ends
@offsets
@kinds
def test_every_step_is_that_of_diffusers_where_its_own_chain(
    spacing: str, steps: int, one: bool, offset: int, kind: str
) -> None:
    scheduler, table = scheduler_and_table(
        steps, timestep_spacing=spacing, set_alpha_to_one=one, steps_offset=offset, prediction_type=kind
    )
    assert len(table) == steps and table.timesteps.tolist() == scheduler.timesteps.tolist()
    compared = 0
    for i, t in enumerate(table.timesteps):
        if not chains(scheduler, i):
            continue
        z, out = noise(2 * i), noise(2 * i + 1)
        theirs = scheduler.step(out, int(t), z, eta=0.0, return_dict=False)[0]
        eps = from_v(z, out, table.alphas[i]) if kind == "v_prediction" else out
        torch.testing.assert_close(
            move(z, eps, table.alphas[i], table.alphas[i + 1]), theirs, atol=2e-5, rtol=2e-5
        )
        compared += 1
    assert compared == steps or (spacing == "linspace" and compared >= 1)


@pytest.mark.parametrize("steps", [10, 25, 50, 100])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@ends
@offsets
def test_every_step_back_is_that_of_diffusers_inverse_scheduler(
    spacing: str, steps: int, one: bool, offset: int
) -> None:
    config: dict[str, Any] = {"timestep_spacing": spacing, "set_alpha_to_one": one, "steps_offset": offset}
    _, table = scheduler_and_table(steps, **config)
    inverse = inverse_scheduler(config)
    inverse.set_timesteps(steps)
    assert inverse.timesteps.flip(0).tolist() == table.timesteps.tolist()
    z = theirs = noise(0)
    for i in reversed(range(steps)):
        eps = noise(i + 1)
        z = move(z, eps, table.alphas[i + 1], table.alphas[i])
        theirs = inverse.step(eps, int(table.timesteps[i]), theirs, return_dict=False)[0]
        torch.testing.assert_close(z, theirs, atol=5e-5, rtol=5e-5)


@kinds
def test_a_step_back_takes_v_predictions_as_the_inverse_scheduler_does_at_the_alpha_z_has(kind: str) -> None:
    config: dict[str, Any] = {"set_alpha_to_one": False, "steps_offset": 1, "prediction_type": kind}
    _, table = scheduler_and_table(50, **config)
    inverse = inverse_scheduler(config)
    inverse.set_timesteps(50)
    for i in range(50):
        z, out = noise(i), noise(i + 99)
        eps = from_v(z, out, table.alphas[i + 1]) if kind == "v_prediction" else out
        theirs = inverse.step(out, int(table.timesteps[i]), z, return_dict=False)[0]
        torch.testing.assert_close(
            move(z, eps, table.alphas[i + 1], table.alphas[i]), theirs, atol=2e-5, rtol=2e-5
        )


@pytest.mark.parametrize(
    ("spacing", "steps"),
    [("linspace", 30), ("linspace", 50), ("linspace", 70), ("trailing", 30), ("trailing", 70)],
)
def test_ours_goes_to_the_next_entry_where_the_step_of_diffusers_does_not(spacing: str, steps: int) -> None:
    scheduler, table = scheduler_and_table(steps, timestep_spacing=spacing, set_alpha_to_one=False)
    assert not all(chains(scheduler, i) for i in range(steps))
    own = scheduler.alphas_cumprod.double()[table.timesteps]
    assert torch.equal(table.alphas[:-1], own)
    assert table.alphas[-1] == float(scheduler.alphas_cumprod[0])


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [10, 30, 50, 61, 100])
@ends
def test_back_and_forth_under_one_epsilon_is_the_identity(spacing: str, steps: int, one: bool) -> None:
    _, table = scheduler_and_table(steps, timestep_spacing=spacing, set_alpha_to_one=one)
    z_0 = z = noise(0, torch.float64)
    eps = noise(1, torch.float64)
    for i in reversed(range(steps)):
        z = move(z, eps, table.alphas[i + 1], table.alphas[i])
    assert not torch.allclose(z, z_0)
    for i in range(steps):
        z = move(z, eps, table.alphas[i], table.alphas[i + 1])
    torch.testing.assert_close(z, z_0, atol=1e-12, rtol=1e-12)


def test_with_the_true_noise_one_move_reaches_every_level() -> None:
    _, table = scheduler_and_table(20)
    z_0, eps = noise(0, torch.float64), noise(1, torch.float64)
    for alpha in table.alphas:
        expected = alpha.sqrt() * z_0 + (1 - alpha).sqrt() * eps
        torch.testing.assert_close(move(z_0, eps, 1.0, alpha), expected, atol=1e-12, rtol=1e-12)
        v = alpha.sqrt() * eps - (1 - alpha).sqrt() * z_0
        torch.testing.assert_close(from_v(expected, v, alpha), eps, atol=1e-12, rtol=1e-12)


def test_noise_is_added_and_v_made_as_by_diffusers_and_at_a_step_by_its_own_alpha() -> None:
    scheduler, table = scheduler_and_table(10)
    z_0, eps, t = noise(0), noise(1), scheduler.timesteps[[3, 7]]
    alphas = scheduler.alphas_cumprod[t]
    theirs = scheduler.add_noise(z_0, eps, t)  # pyright: ignore[reportArgumentType]
    assert torch.equal(noised(z_0, eps, alphas), theirs)
    assert torch.equal(true_v(z_0, eps, alphas), scheduler.get_velocity(z_0, eps, t))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(table.noised(z_0, eps, torch.tensor([3, 7])), theirs)
    torch.testing.assert_close(table.noised(z_0, eps, 3)[0], theirs[0])
    torch.testing.assert_close(from_v(theirs, true_v(z_0, eps, alphas), alphas), eps)


def test_a_row_may_have_its_own_alphas() -> None:
    z, eps = noise(0), noise(1)
    a, b = torch.tensor([0.2, 0.5]), torch.tensor([0.4, 0.9])
    together, v_together = move(z, eps, a, b), from_v(z, eps, a)
    for n in range(2):
        row = slice(n, n + 1)
        torch.testing.assert_close(together[row], move(z[row], eps[row], float(a[n]), float(b[n])))
        torch.testing.assert_close(v_together[row], from_v(z[row], eps[row], float(a[n])))


def test_a_move_is_made_in_fp32_whatever_the_network_gives_and_is_differentiable() -> None:
    z, eps = noise(0), noise(1).bfloat16().requires_grad_()
    moved = move(z, eps, 0.3, 0.4)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, move(z, eps.float(), 0.3, 0.4))
    moved.sum().backward()
    assert eps.grad is not None
    assert from_v(z, eps, 0.3).dtype == torch.float32
    assert move(z.half(), z.half(), 0.3, 0.4).dtype == torch.float32


def test_a_step_that_stays_at_its_alpha_has_no_effect_and_is_known() -> None:
    _, table = scheduler_and_table(50, set_alpha_to_one=False, steps_offset=0)
    assert [i for i in range(50) if not table.has_effect(i)] == [49]
    z = noise(0)
    assert torch.equal(move(z, noise(1), table.alphas[49], table.alphas[50]), z)
    for to_one, offset in ((True, 0), (False, 1)):
        _, table = scheduler_and_table(50, set_alpha_to_one=to_one, steps_offset=offset)
        assert all(table.has_effect(i) for i in range(50))


def test_zero_terminal_snr_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="zero terminal SNR") as error:
        scheduler_and_table(50, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert "\n" not in str(error.value) and "--model.timestep_spacing leading" in str(error.value)
    assert "rescale" not in str(error.value)  # without it, every timestep would have another noise


def test_a_table_out_of_order_or_of_a_longer_schedule_is_refused() -> None:
    alphas = torch.linspace(0.1, 0.9, 10, dtype=torch.float64)
    with pytest.raises(UserError, match="must descend"):
        StepTable(torch.tensor([1, 2]), alphas[:3])
    with pytest.raises(UserError, match="must rise"):
        StepTable(torch.tensor([2, 1]), alphas[:3].flip(0))
    with pytest.raises(UserError, match="knows 0 to 9"):
        StepTable.through(torch.tensor([10, 5]), alphas.flip(0), 1.0)


@pytest.mark.parametrize("ends", [(0.1, 0.4), (0.4, 0.9), (0.9, 1.0)])
def test_the_predicted_picture_is_what_both_ends_of_a_step_were_made_of(ends: tuple[float, float]) -> None:
    z_0, eps = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    z_from, z_to = (alpha**0.5 * z_0 + (1 - alpha) ** 0.5 * eps for alpha in ends)
    table = StepTable(torch.tensor([9, 5]), torch.tensor([*ends, ends[1]], dtype=torch.float64))
    torch.testing.assert_close(table.predicted_z_0(z_from, z_to, 0), z_0, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="carries no information about the picture"):
        table.predicted_z_0(z_from, z_from, 1)
