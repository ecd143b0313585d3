"""Two ranks on the CPU: every picture is tuned by one of them, as a single process would have tuned it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import fits
import pytest
import torch
from commands import kvinv
from fits import SOURCE
from forked import begun

from kvinv_pl.cli.entry import main
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.devices.launcher import PATIENCE
from kvinv_pl.training.devices.ranks import CALL, QUEUE, STARTER, Ranks
from kvinv_pl.training.devices.strategy import ImageParallelStrategy
from kvinv_pl.training.devices.work_queue import WorkQueue
from kvinv_pl.training.trainer import KVTrainer

UNLIKE = ("--steps", 3, "--model.inner_steps", 4, "--model.tolerance", 0.12, "--model.retries", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures, one of which is none and one of another size: with slots 2, ragged shares."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate("abcde"):
        fits.picture(folder / f"{name}.png", seed=seed, size=(24, 16) if name == "e" else (16, 16))
    (folder / "bad.png").write_text("no picture")
    return folder


def given(folder: Path, out: Path, devices: int, *more: object) -> list[object]:
    return [
        "fit", "--image", folder, "--source", SOURCE, "--out", out, "--checkpoint", fits.checkpoint(),
        *UNLIKE, "--model.slots", 2, "--trainer.accelerator", "cpu", "--trainer.devices", devices, *more,
    ]  # fmt: skip


PROGRAM = """
import sys
from kvinv_pl.errors import SomeFailedError
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.trainer import KVTrainer

print("begins", flush=True)
folder, checkpoint, out = sys.argv[1:]
data = SourceImages(folder, "a cat standing", out=out)
settings = {"steps": 3, "inner_steps": 4, "tolerance": 0.12, "retries": 0, "slots": 2}
trainer = KVTrainer(accelerator="cpu", devices=2)
try:
    trainer.fit(KVInversion(checkpoint, **settings), datamodule=data)
except SomeFailedError as error:
    print(*error.reasons)
"""


def test_two_ranks_tune_what_one_process_tunes_bit_for_bit_and_leave_their_program_after_its_call(
    folder: Path, tmp_path: Path
) -> None:
    one = kvinv(*given(folder, tmp_path / "1", 1))
    assert one.code == 1 and "Traceback" not in one.err, one.err
    assert one.err.splitlines()[-1].startswith("kvinv: error: 1 of 6 pictures failed")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "program.py", str(folder), str(fits.checkpoint()), "2"],
        timeout=200, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.splitlines() == ["begins", "begins", str(folder / "bad.png")]
    assert sum("bad.png: " in line for line in one.err.splitlines()) == 1
    lines = done.stderr.splitlines()
    for name in "abcde":  # whichever rank it was with
        (at,) = [n for n, line in enumerate(lines) if line.startswith(f"look at {Path('2') / name}")]
        missed = not RunStore(tmp_path / "2" / name).read_run()["reconstruction"]["passed"]
        assert missed == ("below the 35 dB required" in lines[at + 1])
    used = set[int]()
    for name in "abcde":
        alone, shared = (RunStore(tmp_path / str(ranks) / name) for ranks in (1, 2))
        assert fits.tensors(alone) == fits.tensors(shared) and len(fits.tensors(alone)) == 4
        used |= {shared.step_info(i)["inner_steps"] for i in range(3)}
    assert len(used) > 1  # of unlike convergence
    assert {path.name for path in (tmp_path / "2" / "logs").iterdir() if path.is_dir()} == {"rank0", "rank1"}


def test_when_a_rank_is_killed_all_stop_and_the_same_command_goes_on(folder: Path, tmp_path: Path) -> None:
    args = given(folder, tmp_path / "out", 2, "--steps", 40)
    with begun(*args) as first:
        ends, ranks = time.monotonic() + 200, list[int]()
        while time.monotonic() < ends and not ranks:
            ranks = [
                int(file.read_text())
                for file in tmp_path.glob("out/*/.lock.pid")
                if file.read_text().isdigit() and int(file.read_text()) != first.pid
            ]
            assert first.poll() is None
            time.sleep(0.05)
        os.kill(ranks[0], signal.SIGKILL)
        _, err = first.communicate(timeout=100)
    says = "another rank has failed: process 2 of 2 ended by signal 9, and all have been stopped"
    assert first.returncode == 2 and says in err, err
    for file in tmp_path.glob("out/*/.lock.pid"):  # of the killed one
        assert int(file.read_text()) == ranks[0]
    for name in "abcde":
        with RunStore(tmp_path / "out" / name).lock():
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="a process's children are found under /proc")
@pytest.mark.parametrize(("loading", "sent", "code"), [(False, "SIGTERM", 143), (True, "SIGINT", 130)])
def test_a_command_that_is_asked_to_end_ends_with_its_ranks(
    loading: bool, sent: str, code: int, folder: Path, tmp_path: Path
) -> None:
    args = given(folder, tmp_path / "out", 2, "--steps", 40)
    with begun(*args) as first:
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
        ends = time.monotonic() + 200
        while not (ranks := children.read_text().split()) or not (
            loading or [*tmp_path.glob("out/*/steps/*")]
        ):
            assert first.poll() is None and time.monotonic() < ends
            time.sleep(0.002)
        first.send_signal(getattr(signal, sent))
        asked = time.monotonic()
        _, err = first.communicate(timeout=100)
    assert time.monotonic() - asked < PATIENCE, err
    assert first.returncode == code, err
    assert err.splitlines()[-1].startswith("kvinv: stopped; run the same command to resume"), err
    assert not Path(f"/proc/{ranks[0]}").exists()


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Variables that a launcher sets, taken back afterwards."""
    before = dict(os.environ)
    yield os.environ  # pyright: ignore[reportReturnType]
    os.environ.clear()
    os.environ.update(before)


def trainer(devices: int, **options: int) -> KVTrainer:
    return fits.trainer(devices=devices, **options)


def test_shares_are_each_one_ranks_alone_under_torchrun(environment: dict[str, str]) -> None:
    taken = list[int]()
    for rank in range(4):
        environment |= {
            "TORCHELASTIC_RUN_ID": "job", "RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank % 2),
            "GROUP_RANK": str(rank // 2), "LOCAL_WORLD_SIZE": "2",
        }  # fmt: skip
        ranks = trainer(2, num_nodes=2).ranks
        assert (ranks.world.rank, ranks.world.local_rank, ranks.world.size) == (rank, rank % 2, 4)
        assert ranks.is_one_of_many and ranks.is_main == (rank == 0)
        taken += ranks.claim_shares(7)
    assert sorted(taken) == [*range(7)]


def test_ranks_are_those_of_slurm_in_a_job_of_slurm(environment: dict[str, str]) -> None:
    environment |= {
        "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "kvinv", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NODELIST": "a,b",
    }  # fmt: skip
    ranks = trainer(2, num_nodes=2).ranks
    assert (ranks.world.rank, ranks.world.local_rank, ranks.world.size) == (3, 1, 4)
    assert [*ranks.claim_shares(9)] == [3, 7]


def test_ranks_of_one_machine_begin_with_one_each_and_take_what_is_free(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment |= {STARTER: str(os.getppid()), QUEUE: str(tmp_path)}
    shares = list[Iterator[int]]()
    for rank in range(2):
        environment["LOCAL_RANK"] = str(rank)
        shares.append(trainer(2).ranks.claim_shares(6))
    one, other = shares
    assert [next(other), next(other), next(one), next(other), next(one)] == [1, 2, 0, 3, 4]
    assert [*one, *other] == [5]


class Rank:
    """A process as `subprocess` has it, that ends when it is asked to."""

    def __init__(self, ended: int | None = None) -> None:
        self.ended = ended

    def poll(self) -> int | None:
        return self.ended

    def terminate(self) -> None:
        self.ended = -signal.SIGTERM

    def wait(self, timeout: float) -> None:
        assert self.ended is not None


def test_ranks_without_a_share_are_stopped(environment: dict[str, str], tmp_path: Path) -> None:
    ranks, started = trainer(4).ranks, [Rank(), Rank(), Rank()]
    ranks._queue, ranks._started = WorkQueue(tmp_path), list(started)  # pyright: ignore[reportAttributeAccessIssue]
    ranks.publish_shares([(1, [0]), (1, [1])])
    assert ranks._started == started[:1]
    assert [rank.ended for rank in started] == [None, -signal.SIGTERM, -signal.SIGTERM]
    ranks.check_ranks()  # that they were stopped is no failure


@pytest.mark.parametrize(
    ("ended", "reported", "failed"), [(0, True, False), (0, False, True), (2, True, True)]
)
def test_a_rank_that_has_not_said_that_it_is_done_has_failed(
    ended: int, reported: bool, failed: bool, environment: dict[str, str], tmp_path: Path
) -> None:
    """Lightning ends a process by exit code 0 where it was asked to end in the middle of a fit."""
    ranks, other = trainer(2).ranks, Rank()
    ranks._queue, ranks._started = WorkQueue(tmp_path), [other]  # pyright: ignore[reportAttributeAccessIssue]
    ranks.check_ranks()
    if reported:
        ranks._queue.report(1, {})
    other.ended = ended
    with pytest.raises(UserError, match="another rank has failed") if failed else nullcontext():
        ranks.check_ranks()


def test_what_is_wrong_with_a_rank_is_said_by_the_one_that_started_it(
    environment: dict[str, str], tmp_path: Path
) -> None:
    starter, other = trainer(2).ranks, Rank()
    starter._queue, starter._started = WorkQueue(tmp_path), [other]  # pyright: ignore[reportAttributeAccessIssue]
    environment |= {STARTER: str(os.getppid()), QUEUE: str(tmp_path), "LOCAL_RANK": "1"}
    with pytest.raises(SystemExit) as stop, trainer(2).ranks.running():
        raise UserError("no room in out: make some")
    other.ended = 2
    del environment[STARTER]
    with pytest.raises(UserError, match="no room in out: make some; all ranks have been stopped") as told:
        starter.check_ranks()
    assert stop.value.code == 2 and "in that rank" in str(told.value.__cause__)


def test_a_rank_serves_the_call_that_it_was_started_for(
    folder: Path, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank goes anew through a program that calls a trainer twice, and leaves out the other call."""
    queue = WorkQueue(tmp_path / "queue")
    queue.folder.mkdir()
    queue.publish([])
    monkeypatch.setattr(Ranks, "calls", 0)
    environment |= {STARTER: str(os.getppid()), QUEUE: str(queue.folder), "LOCAL_RANK": "1", CALL: "2"}
    data, module = SourceImages(str(folder / "a.png"), SOURCE, out=str(tmp_path / "run")), fits.model()
    fits.trainer(devices=2).invert(module, data)
    assert not queue.has_reported(1) and not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        fits.trainer(devices=2).fit(module, datamodule=data)
    assert queue.has_reported(1)


def test_what_failed_reaches_the_rank_that_started_this_one(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment |= {STARTER: str(os.getppid()), QUEUE: str(tmp_path), "LOCAL_RANK": "1"}
    ranks = trainer(2).ranks
    ranks.report({"a.png": "is no picture"})
    WorkQueue(tmp_path).publish([(2, [0, 1]), (2, [3])])
    assert ranks.wait_for_shares() == [(2, [0, 1]), (2, [3])]
    assert ranks.was_started and WorkQueue(tmp_path).failures() == {"a.png": "is no picture"}
    environment[STARTER] = "1" if os.getppid() != 1 else "2"
    with monkeypatch.context() as patch:  # where a virtual environment starts Python by a process in between
        patch.setattr(sys, "platform", "win32")
        ranks.check_ranks()
    with pytest.raises(UserError, match="the process that started this rank is gone"):
        ranks.check_ranks()
    assert not tmp_path.exists()  # whoever was to remove the queue cannot


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed", "ddp_spawn"])
def test_data_parallelism_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UserError, match=f"got {name}: data parallelism would average the psi of different"):
        fits.trainer(strategy=name)


def test_more_ranks_than_devices_are_refused(environment: dict[str, str]) -> None:
    environment["LOCAL_RANK"] = "2"
    with pytest.raises(UserError, match=r"process 3 .* there are 2 devices"):
        trainer(2)


def test_many_machines_that_nobody_tells_apart_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="num_nodes: got 2, but this machine's rank is unknown"):
        trainer(1, num_nodes=2)
    environment["NODE_RANK"] = "1"
    assert [*trainer(1, num_nodes=2).ranks.claim_shares(4)] == [1, 3]


def test_the_model_stays_on_its_device_and_nothing_is_reduced() -> None:
    strategy = ImageParallelStrategy()
    psi = torch.ones(2)
    assert strategy.reduce(psi) is psi and strategy.all_gather(psi) is psi and strategy.launcher is None


def test_the_devices_of_a_command_are_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--image", "cat.png", "--trainer.devices", "0"])
    assert "devices and num_nodes: expected 1 or more, got 0 and 1" in capsys.readouterr().err
