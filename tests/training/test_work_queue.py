"""The work queue of the ranks of one machine: what is claimed is one rank's alone, what is read is whole."""

from pathlib import Path

import pytest

from kvinv_pl.errors import UserError
from kvinv_pl.training.devices.work_queue import WorkQueue


@pytest.fixture
def queue(tmp_path: Path) -> WorkQueue:
    return WorkQueue(tmp_path)


def test_the_shares_are_those_that_were_given(queue: WorkQueue) -> None:
    assert queue.shares() is None
    queue.publish([(2, [0, 1]), (8, [3])])
    assert WorkQueue(queue.folder).shares() == [(2, [0, 1]), (8, [3])]


def test_a_share_is_claimed_once(queue: WorkQueue) -> None:
    assert queue.claim(3) and not WorkQueue(queue.folder).claim(3) and queue.claim(4)


def test_what_failed_is_known_by_all_reports(queue: WorkQueue) -> None:
    assert queue.failures() == {}
    queue.report(1, {"a.png": "no picture"})
    queue.report(2, {"b.png": "too small"})
    assert queue.failures() == {"a.png": "no picture", "b.png": "too small"}


def test_a_removed_queue_is_not_made_again_by_a_rank_that_reports_to_it(queue: WorkQueue) -> None:
    queue.remove()
    with pytest.raises(UserError):
        queue.report(1, {})
    assert not queue.folder.exists()
