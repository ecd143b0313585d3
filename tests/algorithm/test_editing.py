from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from kvinv_pl.algorithm.ddim import StepTable, move
from kvinv_pl.algorithm.editing import Guidance, edit, first_step

T = 10
TABLE = StepTable(
    torch.arange(901, 0, -100), torch.cat([torch.linspace(0.01, 0.9, T), torch.tensor([0.99])]).double()
)


class Network:
    """An epsilon that is another one while psi is in force, and remembers when it was."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.calls: list[tuple[int | None, list[int]]] = []

    @contextmanager
    def psi(self, i: int) -> Iterator[None]:
        assert self.step is None
        self.step = i
        yield
        self.step = None

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        self.calls.append((self.step, t.tolist()))
        return torch.stack([0.2 * z, (0.5 if self.step is not None else 0.3) * z + 0.1])


@pytest.mark.parametrize(
    ("start", "first"), [(0.0, 0), (0.1, 1), (0.14, 1), (0.15, 2), (0.25, 3), (0.9, 9), (1.0, 10)]
)
def test_psi_is_in_force_from_step_round_start_T_on_and_not_before(start: float, first: int) -> None:
    network = Network()
    edit(network, torch.randn(1, 4, 2, 2), TABLE, network.psi, Guidance(4.0, 4.0), start)
    assert first_step(start, T) == first
    assert [step for step, _ in network.calls] == [None] * first + [*range(first, T)]
    assert [t for _, t in network.calls] == [[t] for t in TABLE.timesteps.tolist()]


def test_every_step_moves_along_the_guided_predictionilon() -> None:
    network, z = Network(), torch.randn(2, 4, 2, 3, dtype=torch.float64)
    made = edit(network, z, TABLE, network.psi, Guidance(7.5, 7.5), 0.3)
    for i in range(T):
        eps_u, eps_c = 0.2 * z, (0.5 if i >= 3 else 0.3) * z + 0.1
        z = move(z, eps_u + 7.5 * (eps_c - eps_u), TABLE.alphas[i], TABLE.alphas[i + 1])
    torch.testing.assert_close(made, z, rtol=0, atol=1e-12)


def test_several_edits_go_side_by_side_under_one_psi_and_do_not_see_each_other() -> None:
    z, network = torch.randn(3, 4, 2, 2, dtype=torch.float64), Network()
    together = edit(network, z, TABLE, network.psi, Guidance(4.0, 4.0), 0.5)
    assert len(network.calls) == T  # one call of the network a step, for all edits
    for row in range(3):
        alone = Network()
        torch.testing.assert_close(
            edit(alone, z[row : row + 1], TABLE, alone.psi, Guidance(4.0, 4.0), 0.5),
            together[row : row + 1],
            rtol=0,
            atol=0,
        )


def test_every_step_is_reported_once_in_order() -> None:
    network, told = Network(), list[int]()

    def after(i: int, z: torch.Tensor) -> torch.Tensor:
        told.append(i)
        return z

    edit(network, torch.randn(1, 4, 2, 2), TABLE, network.psi, Guidance(4.0, 4.0), 0.5, after)
    assert told == [*range(T)]
