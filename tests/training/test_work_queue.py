"""The board of the ranks of one machine: what is taken is one rank's alone, what is read is whole."""

from pathlib import Path

import pytest

from kvinv_pl.training.work_queue import WorkQueue


@pytest.fixture
def board(tmp_path: Path) -> WorkQueue:
    return WorkQueue(tmp_path)


def test_the_shares_are_those_that_were_given(board: WorkQueue) -> None:
    assert board.shares() is None
    board.give([(2, [0, 1]), (8, [3])])
    assert WorkQueue(board.folder).shares() == [(2, [0, 1]), (8, [3])]


def test_a_share_is_taken_once(board: WorkQueue) -> None:
    assert board.take(3) and not WorkQueue(board.folder).take(3) and board.take(4)


def test_what_failed_is_known_by_all_reports(board: WorkQueue) -> None:
    assert board.reported() == {}
    board.report(1, {"a.png": "no picture"})
    board.report(2, {"b.png": "too small"})
    assert board.reported() == {"a.png": "no picture", "b.png": "too small"}
