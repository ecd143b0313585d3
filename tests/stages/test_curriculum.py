import pytest
import torch
from torch import nn

from kvinv_pl.errors import UserError
from kvinv_pl.models.denoiser import generator
from kvinv_pl.stages.curriculum import at_pivots, first_missing, make_batches, missing_at_pivots, roll_out
from kvinv_pl.stages.settings import TuningSettings
from kvinv_pl.stages.tuning.slot_keeper import SlotKeeper
from kvinv_pl.training.module import KVInversion


def test_a_picture_goes_on_at_its_first_missing_step_whatever_lies_after_it() -> None:
    assert first_missing(set(), 4) == 0
    assert first_missing({0, 1, 3}, 4) == 2
    assert first_missing({0, 1, 2, 3}, 4) == 4


def test_every_unfinished_step_of_every_picture_is_exactly_one_phase() -> None:
    done = [{0, 1}, set(), {0, 1, 2, 3}, {0, 1}, {0}]
    for slots in (1, 2, 3):
        made = make_batches(done, 4, slots)
        covered = [
            (member, step)
            for phase in roll_out(made, 4)
            for member, step, active in zip(phase.members, phase.steps, phase.active, strict=True)
            if active
        ]
        missing = [(picture, step) for picture in range(5) for step in range(4) if step >= len(done[picture])]
        assert len(covered) == len({*covered}) and {*missing} <= {*covered}
        again = {*covered} - {*missing}
        assert all(step == len(done[picture]) - 1 for picture, step in again)


def test_pictures_side_by_side_go_on_at_the_same_step_each_in_its_slot_beside_copies() -> None:
    made = make_batches([set(), {0, 1}, set(), {0, 1, 2}, set()], 3, 2)
    assert [(batch.members, batch.active, batch.first) for batch in made] == [
        ((0, 0), (True, False), 0),
        ((1, 1), (False, True), 2),
        ((2, 2), (True, False), 0),
        ((4, 4), (True, False), 0),
    ]


def test_a_picture_that_is_one_step_ahead_makes_that_step_again_beside_the_others() -> None:
    made = make_batches([{0, 1}, {0}, {0, 1, 2}], 3, 3)
    assert [(batch.members, batch.active, batch.first) for batch in made] == [
        ((0, 1, 0), (True, True, False), 1)
    ]
    assert make_batches([{0, 1}, {0, 1, 2}], 3, 2)[0].active == (True, True)  # the last step of both
    assert make_batches([{0, 1}, None], 3, 2)[0].active == (True, False)  # a picture that is to be left


def test_the_phases_of_a_batch_follow_each_other_from_noise_to_picture() -> None:
    made = make_batches([{0}, set()], 3, 1)
    phases = [(phase.members, phase.steps, phase.enters) for phase in roll_out(made, 3)]
    assert phases == [
        ((0,), (1,), True), ((0,), (2,), False), ((1,), (0,), True), ((1,), (1,), False), ((1,), (2,), False)
    ]  # fmt: skip
    assert roll_out(make_batches([{0, 1, 2}], 3, 1), 3) == []


def settings(tolerance: float, growth: float) -> TuningSettings:
    return KVInversion(tolerance=tolerance, tolerance_growth=growth).tuning


def test_the_tolerance_grows_with_the_step_and_is_reached_by_equality() -> None:
    rule = settings(0.5, 0.25)
    errors = torch.tensor([0.4, 0.5, 0.75, 0.8])
    assert rule.has_converged(errors, torch.zeros(4, dtype=torch.long)).tolist() == [True, True, False, False]
    assert rule.has_converged(errors, torch.ones(4, dtype=torch.long)).tolist() == [True, True, True, False]
    assert rule.has_converged(errors, torch.tensor([0, 1, 0, 2])).tolist() == [True, True, False, True]


def test_an_infinite_tolerance_is_reached_at_once_and_none_by_what_is_not_a_number() -> None:
    assert settings(float("inf"), 0.0).has_converged(torch.tensor([1e30]), torch.tensor([0])).all()
    assert not settings(0.0, 0.0).has_converged(torch.tensor([float("nan")]), torch.tensor([0])).any()


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        ((-1e-5, 0.0), "tolerance: expected a mean squared error of 0 or more, got -1e-05"),
        ((float("nan"), 0.0), "tolerance: expected a mean squared error of 0 or more, got nan"),
        ((0.0, -1.0), "tolerance_growth: expected a mean squared error of 0 or more, got -1.0"),
        ((0.0, float("nan")), "tolerance_growth: expected a mean squared error of 0 or more, got nan"),
    ],
)
def test_a_tolerance_below_zero_is_refused_by_its_name(bounds: tuple[float, float], says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}$"):
        settings(*bounds)


def test_a_stopped_slot_stays_where_it_stopped_while_momentum_would_carry_it_on() -> None:
    psi = nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.Adam([psi], lr=0.1)
    keeper = SlotKeeper([psi], 2, torch.zeros(2, dtype=torch.bool))
    stopped_at = psi[0].detach().clone()
    for n in range(6):
        if n == 3:
            keeper.stop(torch.tensor([True, False]))
            stopped_at = psi[0].detach().clone()
        optimizer.zero_grad()
        (psi - 1).square().sum(1)[~keeper.stopped].sum().backward()
        optimizer.step()
        if n == 3:
            assert not torch.equal(psi[0], stopped_at)  # it is momentum that does it
        keeper.restore()
    assert torch.equal(psi[0], stopped_at)
    assert not torch.equal(psi[1], stopped_at)
    assert not keeper.all_stopped


def test_stopping_again_does_not_move_what_was_kept() -> None:
    psi = nn.Parameter(torch.zeros(2, 1))
    keeper = SlotKeeper([psi], 2, torch.tensor([False, False]))
    keeper.stop(torch.tensor([True, False]))
    with torch.no_grad():
        psi += 5
    keeper.stop(torch.tensor([True, True]))
    keeper.restore()
    assert psi.tolist() == [[0.0], [5.0]]
    assert keeper.all_stopped


def test_padding_never_keeps_a_phase_going() -> None:
    keeper = SlotKeeper([nn.Parameter(torch.zeros(2, 1))], 2, torch.tensor([False, True]))
    assert not keeper.all_stopped
    keeper.stop(torch.tensor([True, False]))
    assert keeper.all_stopped


def test_randomness_depends_on_seed_picture_and_step_and_on_nothing_else() -> None:
    def draw(seed: int, picture: str, step: int) -> list[float]:
        return torch.randn(3, generator=generator(seed, picture, step)).tolist()

    first = draw(0, "cat", 1)
    torch.randn(100)  # whatever else is drawn
    assert draw(0, "cat", 1) == first
    assert first not in (draw(1, "cat", 1), draw(0, "dog", 1), draw(0, "cat", 2))


def test_every_timestep_that_is_missing_at_its_pivot_has_one_slot_of_one_phase() -> None:
    missing = [{0, 1, 2, 3}, {2}, set(), {0, 3}]
    for slots in (1, 2, 3, 5, 100):
        phases = at_pivots(missing, 4, slots)
        held = [
            (member, step)
            for phase in phases
            for member, step, active in zip(phase.members, phase.steps, phase.active, strict=True)
            if active
        ]
        assert held == [(picture, step) for picture, steps in enumerate(missing) for step in sorted(steps)]
        assert all(len(phase.members) == slots and phase.enters for phase in phases)


def test_in_which_slot_a_timestep_is_does_not_follow_from_what_is_done() -> None:
    def places(
        missing: list[set[int]],
    ) -> dict[tuple[int, int], tuple[int, tuple[int, ...], tuple[int, ...]]]:
        return {
            (phase.members[slot], phase.steps[slot]): (slot, phase.members, phase.steps)
            for phase in at_pivots(missing, 4, 3)
            for slot in range(3)
            if phase.active[slot]
        }

    whole = places([{0, 1, 2, 3}, {0, 1, 2, 3}])
    for missing in ([{3}, {1, 2}], [set[int](), {3}], [{0, 1, 2, 3}, {0}]):
        assert places(missing).items() <= whole.items()


def test_at_the_pivots_only_what_the_batches_have_yet_to_roll_out_is_missing() -> None:
    made = make_batches([{0, 1}, {0}, {0, 1, 2}, None], 3, 4)
    there = [{0, 1, 2}, {2}, set[int](), set[int]()]
    assert missing_at_pivots(made, there, 3, carry=False) == [set(), {1}, set(), set()]
    assert missing_at_pivots(made, there, 3, carry=True) == [set(), {0, 1}, set(), set()]
    alone = make_batches([set(), {0, 1, 2}], 3, 1)
    assert missing_at_pivots(alone, [{1}, set()], 3, carry=True) == [{0, 2}, set()]
