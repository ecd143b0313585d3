"""The Gauss-Newton step length: exact where the residuals are linear, slot by slot, and cheap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from torch import Tensor

from kvinv_pl.errors import UserError
from kvinv_pl.optimizers import GaussNewtonDescent


def problem(slots: int = 3) -> tuple[Tensor, Callable[[], Tensor], Tensor]:
    """Linear residuals A x - b with another A and b for each slot, and the least error of each."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(slots, 6, 4, generator=g), torch.randn(slots, 6, 1, generator=g)
    x = torch.zeros(slots, 4, requires_grad=True)
    best = a @ torch.linalg.pinv(a) @ b
    return x, lambda: (a @ x[..., None] - b).squeeze(-1), (best - b).square().sum((1, 2))


def errors(residuals: Callable[[], Tensor]) -> Tensor:
    return residuals().square().sum(1).detach()


def test_on_linear_residuals_a_step_goes_to_the_lowest_point_along_the_gradient():
    x, residuals, _ = problem()
    residuals().square().sum().backward()
    assert x.grad is not None
    d = -x.grad.clone()
    GaussNewtonDescent([x], lr=0.1).step(residuals)
    reached = errors(residuals)
    way = (x / d).detach()
    assert torch.allclose(way, way[:, :1].expand_as(way), rtol=1e-4)
    for further in (0.99, 1.01):
        with torch.no_grad():
            end = x.clone()
            x.mul_(further)
            assert (errors(residuals) > reached).all()
            x.copy_(end)


def test_every_tensor_takes_part_however_small_its_gradient():
    x, y = torch.zeros(1, 3, requires_grad=True), torch.zeros(1, 3, requires_grad=True)
    GaussNewtonDescent([x, y], lr=0.1).step(lambda: torch.cat([x - 1, 1e-3 * (y - 1)], 1))
    assert torch.allclose(x, y) and (y > 0.9).all()


def test_steps_converge_and_slots_do_not_see_each_other():
    x, residuals, least = problem()
    begin = errors(residuals)
    for _ in range(200):
        GaussNewtonDescent([x], lr=0.1).step(residuals)
    x_alone, alone, _ = problem()
    with torch.no_grad():
        x_alone[0] = 100.0  # another start for the first slot
    for _ in range(200):
        GaussNewtonDescent([x_alone], lr=0.1).step(alone)
    assert torch.equal(x[1:], x_alone[1:])
    assert torch.allclose(errors(residuals), least, rtol=1e-3) and (least < begin).all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_trial_that_says_nothing_leaves_psi_where_it_is(value: float):
    x = torch.ones(1, 2, requires_grad=True)
    calls = iter([lambda: x * 1.0, lambda: x.detach() * 0 + (1 if value == 0 else value)])
    GaussNewtonDescent([x]).step(lambda: next(calls)())
    assert torch.equal(x.detach(), torch.ones(1, 2))


def test_a_slot_that_has_stopped_stays():
    x, residuals, _ = problem()
    running = torch.tensor([True, False, True])
    GaussNewtonDescent([x]).step(lambda: torch.where(running[:, None], residuals(), 0))
    assert (x[1] == 0).all() and (x[0] != 0).all() and (x[2] != 0).all()


def test_numbers_that_mean_nothing_are_refused():
    for wrong in ({"lr": 0.0}, {"longest": -1.0}):
        with pytest.raises(UserError, match="expected lr and longest above 0"):
            GaussNewtonDescent([torch.zeros(1, 1)], **wrong)


def gauss_newton(parameters: Any) -> GaussNewtonDescent:
    return GaussNewtonDescent(parameters)


def test_a_fit_with_it_lowers_the_loss_of_every_phase_and_slots_agree_with_pictures_alone(tmp_path: Path):
    for n in range(2):
        fits.picture(tmp_path / "pictures" / f"{n}.png", seed=n)
    alone = [
        fits.fit(tmp_path / "pictures" / f"{n}.png", tmp_path / f"alone-{n}", optimizer=gauss_newton)
        for n in range(2)
    ]
    module = fits.model(optimizer=gauss_newton, slots=2)
    fits.fit(tmp_path / "pictures", tmp_path / "both", module)
    for n, store in enumerate(alone):
        phases = [store.step_info(i) for i in range(3)]
        assert all(phase["loss_end"] < phase["loss_start"] for phase in phases)
        together = fits.RunStore(tmp_path / "both" / str(n)).step(2)
        assert torch.allclose(together.z, store.step(2).z, atol=1e-4)


def test_an_inner_step_is_one_forward_more_than_a_step_of_adam(tmp_path: Path):
    image, counts = fits.picture(tmp_path / "cat.png"), {}
    for name, optimizer in {"adam": fits.adam(), "gauss": gauss_newton}.items():
        module = fits.model(optimizer=optimizer, steps=1, inner_steps=4, target_modules="decoder")
        module.load_backbone(torch.float32)
        ran: list[int] = []
        module.denoiser.backbone.unet.register_forward_hook(lambda *_: ran.append(1))  # noqa: B023
        fits.fit(image, tmp_path / name, module)
        counts[name] = len(ran)
    assert counts["gauss"] - counts["adam"] == 4
