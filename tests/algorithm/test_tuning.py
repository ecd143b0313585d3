import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from kvinv_pl.algorithm.ddim import StepTable
from kvinv_pl.algorithm.tuning import reconstruct, squared_errors


def diffusers_table(steps: int) -> tuple[DDIMScheduler, StepTable]:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    final = float(scheduler.final_alpha_cumprod)
    return scheduler, StepTable.through(scheduler.timesteps, scheduler.alphas_cumprod, final)


@pytest.mark.parametrize("steps", [5, 50])
def test_one_reconstruction_step_is_the_step_of_diffusers_ddim_scheduler(steps: int) -> None:
    scheduler, table = diffusers_table(steps)
    z = torch.randn(2, 4, 3, 5)
    for i in range(steps):
        eps = torch.randn(2, 4, 3, 5)
        theirs = scheduler.step(eps, int(table.timesteps[i]), z, return_dict=False)[0]
        torch.testing.assert_close(
            reconstruct(lambda z, t, eps=eps: eps, z, table, i), theirs, rtol=1e-5, atol=1e-5
        )
        z = theirs


def test_equation_4_as_it_is_written() -> None:
    _, table = diffusers_table(5)
    z, i = torch.randn(1, 4, 2, 2, dtype=torch.float64), 2
    eps = z.sin()
    here, there = table.alphas[i], table.alphas[i + 1]
    expected = (there / here).sqrt() * z + there.sqrt() * (
        (1 / there - 1).sqrt() - (1 / here - 1).sqrt()
    ) * eps
    torch.testing.assert_close(reconstruct(lambda z, t: z.sin(), z, table, i), expected, rtol=0, atol=1e-12)


def test_the_network_is_asked_once_at_the_timestep_of_the_step_for_every_slot() -> None:
    _, table = diffusers_table(5)
    asked: list[Tensor] = []

    def eps(z: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return z

    reconstruct(eps, torch.randn(3, 4, 2, 2), table, 1)
    assert [t.tolist() for t in asked] == [[int(table.timesteps[1])] * 3]


def test_the_error_of_a_slot_is_the_sum_over_its_own_latent() -> None:
    pivot, z = torch.zeros(3, 4, 2, 5), torch.zeros(3, 4, 2, 5)
    z[1] = 2.0
    z[2, 0, 0, 0] = 3.0
    assert squared_errors(pivot, z).tolist() == [0.0, 4.0 * 40, 9.0]


def test_errors_are_computed_in_fp32_whatever_the_latents_are() -> None:
    z = torch.full((1, 4, 64, 64), 3.0, dtype=torch.float16)
    errors = squared_errors(torch.zeros_like(z), z)
    assert errors.dtype == torch.float32
    assert errors.item() == 9 * 4 * 64 * 64  # fp16 ends at 65504


def test_the_gradient_of_one_slot_is_the_same_whoever_is_tuned_beside_it() -> None:
    _, table = diffusers_table(5)
    z, pivot = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)

    def gradient(rows: slice) -> Tensor:
        psi = torch.ones(3, 1, 1, 1, requires_grad=True)
        made = reconstruct(lambda z, t: psi[rows] * z, z[rows], table, 3)
        squared_errors(pivot[rows], made).sum().backward()
        assert psi.grad is not None
        return psi.grad[rows]

    torch.testing.assert_close(gradient(slice(0, 3))[1:2], gradient(slice(1, 2)))
