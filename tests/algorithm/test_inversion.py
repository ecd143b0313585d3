import pytest
import torch
from torch import Tensor

from kvinv_pl.algorithm.ddim import StepTable, move
from kvinv_pl.algorithm.inversion import invert

TABLE = StepTable(
    torch.tensor([901, 601, 301, 1]), torch.tensor([0.01, 0.2, 0.6, 0.95, 0.999], dtype=torch.float64)
)


def test_inverting_and_then_sampling_comes_back_exactly_where_epsilon_is_constant() -> None:
    z_0, eps = torch.randn(2, 4, 6, 5, dtype=torch.float64), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    trajectory = invert(lambda z, t: eps, z_0, TABLE)
    z = trajectory[-1]
    for i in range(len(TABLE)):
        z = move(z, eps, TABLE.alphas[i], TABLE.alphas[i + 1])
        torch.testing.assert_close(z, trajectory[len(TABLE) - 1 - i], rtol=0, atol=1e-12)


def test_epsilon_is_taken_at_the_noisier_end_of_each_move_on_the_level_it_leaves() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def eps(z: Tensor, t: Tensor) -> Tensor:
        seen.append((z, t))
        return 0.1 * z

    z_0 = torch.randn(3, 4, 2, 2)
    trajectory = invert(eps, z_0, TABLE)
    assert [t.tolist() for _, t in seen] == [[1] * 3, [301] * 3, [601] * 3, [901] * 3]
    for level, (z, _) in enumerate(seen):
        assert torch.equal(z, trajectory[level])


def test_the_first_level_is_the_picture_itself_and_every_other_is_one_move_of_the_table() -> None:
    z_0 = torch.randn(1, 4, 2, 3)
    trajectory = invert(lambda z, t: z.cos(), z_0, TABLE)
    assert trajectory.shape == (5, 1, 4, 2, 3)
    assert torch.equal(trajectory[0], z_0)
    for level in range(4):
        i = 3 - level
        expected = move(trajectory[level], trajectory[level].cos(), TABLE.alphas[i + 1], TABLE.alphas[i])
        assert torch.equal(trajectory[level + 1], expected)


def test_every_step_is_reported_once_in_the_order_of_the_moves() -> None:
    told: list[int] = []
    invert(lambda z, t: z, torch.randn(1, 4, 2, 2), TABLE, told.append)
    assert told == [3, 2, 1, 0]


@pytest.mark.parametrize("slots", [1, 3])
def test_slots_do_not_see_each_other(slots: int) -> None:
    z_0 = torch.randn(slots, 4, 2, 2, dtype=torch.float64)
    together = invert(lambda z, t: z.sin(), z_0, TABLE)
    for slot in range(slots):
        alone = invert(lambda z, t: z.sin(), z_0[slot : slot + 1], TABLE)
        torch.testing.assert_close(together[:, slot : slot + 1], alone, rtol=0, atol=0)
