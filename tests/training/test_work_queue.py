"""The board of the ranks of one machine: what is taken is one rank's alone, what is read is whole."""

from pathlib import Path

import pytest

from kvinv_pl.stages.curriculum import Phase, at_pivots
from kvinv_pl.stages.plan import Alone
from kvinv_pl.training.work_queue import WorkQueue

PLAN = at_pivots([{0, 1, 2}, {1, 2}], 3, 4)


@pytest.fixture
def board(tmp_path: Path) -> WorkQueue:
    return WorkQueue(tmp_path)


def test_the_shares_are_those_that_were_given(board: WorkQueue) -> None:
    assert board.shares() is None
    board.give([(2, [0, 1]), (8, [3])])
    assert WorkQueue(board.folder).shares() == [(2, [0, 1]), (8, [3])]


def test_a_share_is_taken_once(board: WorkQueue) -> None:
    assert board.take(3) and not WorkQueue(board.folder).take(3) and board.take(4)


def test_a_share_ends(board: WorkQueue) -> None:
    assert not board.has_ended(1)
    board.end(1)
    assert board.has_ended(1) and not board.has_ended(0)


def test_what_failed_is_known_by_all_reports(board: WorkQueue) -> None:
    assert board.reported() == {}
    board.report(1, {"a.png": "no picture"})
    board.report(2, {"b.png": "too small"})
    assert board.reported() == {"a.png": "no picture", "b.png": "too small"}


def test_phases_that_are_offered_are_each_one_ranks_alone(board: WorkQueue) -> None:
    mine = board.offer(5, 1, PLAN)
    (theirs,) = WorkQueue(board.folder).offers()
    assert (theirs.share, theirs.attempt, theirs.plan) == (5, 1, tuple(PLAN))
    assert all(isinstance(phase, Phase) for phase in theirs.plan) and len(PLAN) == 2
    assert mine.take(0) and not theirs.take(0) and theirs.take(1) and not mine.take(1)
    assert not [*board.offers()]  # there is nothing left of it


def test_an_offer_is_done_when_all_ranks_are_done(board: WorkQueue) -> None:
    mine = board.offer(0, 0, PLAN)
    (theirs,) = board.offers()
    assert mine.take(0) and theirs.take(1)
    mine.done(0, {})
    assert not mine.is_done
    theirs.done(1, {"b.png": "not finite"})
    assert mine.is_done and mine.given_up() == {"b.png": "not finite"}


def test_of_an_empty_plan_nothing_is_offered(board: WorkQueue) -> None:
    assert board.offer(0, 0, []).is_done and not [*board.offers()]


def test_attempts_are_offered_apart(board: WorkQueue) -> None:
    offers = [board.offer(0, attempt, PLAN) for attempt in (0, 1)]
    assert offers[0].take(0) and offers[1].take(0)
    assert [offer.attempt for offer in board.offers()] == [0, 1]


def test_a_rank_without_others_has_every_phase() -> None:
    claims = Alone()
    assert claims.take(0) and claims.take(7)
    claims.done(0, {})
    assert claims.given_up() == {}


def test_what_is_withdrawn_is_nobodys(board: WorkQueue) -> None:
    mine = board.offer(0, 0, PLAN)
    (theirs,) = board.offers()
    mine.withdraw()
    assert not [*board.offers()] and not theirs.take(0)


def test_what_is_given_back_is_another_ranks(board: WorkQueue) -> None:
    mine = board.offer(0, 0, PLAN)
    (theirs,) = board.offers()
    assert theirs.take(1)
    theirs.give_back(1)
    assert mine.has_more and mine.take(1)


def test_of_a_share_that_has_ended_nothing_is_offered(board: WorkQueue) -> None:
    board.offer(0, 0, PLAN)
    other = board.offer(10, 0, PLAN)
    board.end(0)
    assert [offer.folder for offer in board.offers()] == [other.folder]
