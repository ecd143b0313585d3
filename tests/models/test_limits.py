"""The limits of a container or a job, from made files of cgroups of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kvinv_pl.models.costs import limits, memory
from kvinv_pl.training.devices.world import World, threads_of

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of /sys/fs/cgroup, on a machine of 16 cores and 64 GiB."""
    monkeypatch.setattr(limits, "OWN", tmp_path / "own")
    monkeypatch.setattr(limits, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text(f"MemAvailable: {64 * 2**20} kB\n")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "cgroup"


def made(root: Path, own: str, files: dict[str, str]) -> None:
    (root.parent / "own").write_text(own)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


def test_without_a_limit_the_machine_counts(root: Path) -> None:
    assert (limits.memory_left(), limits.cores()) == (None, 16)  # no cgroups at all
    made(root, "0::/job\n", {"job/memory.max": "max", "job/memory.current": "5", "job/cpu.max": "max 100000"})
    assert (limits.memory_left(), limits.cores()) == (None, 16)
    unlimited = {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "0"}
    made(
        root,
        "2:memory:/\n1:cpu:/\n",
        {**unlimited, "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "1"},
    )
    assert (memory.free_bytes(CPU), limits.cores()) == (64 * 2**30, 16)


def test_the_lowest_limit_of_the_group_and_those_above_it_counts(root: Path) -> None:
    files = {"memory.current": "1000", "memory.stat": "anon 3\ninactive_file 200"}
    made(root, "0::/slice/job\n", {
        "slice/job/memory.max": "9000", **{f"slice/job/{name}": text for name, text in files.items()},
        "slice/memory.max": "4000", **{f"slice/{name}": text for name, text in files.items()},
        "slice/job/cpu.max": "400000 100000", "slice/cpu.max": "250000 100000",
    })  # fmt: skip
    assert memory.free_bytes(CPU) == 4000 - 1000 + 200
    assert limits.cores() == 3


def test_the_first_version_of_cgroups_is_read_in_a_container_of_another_path(root: Path) -> None:
    own = "5:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n1:name=systemd:/docker/1f\n0::/\n"
    made(root, own, {
        "memory/memory.limit_in_bytes": "8000", "memory/memory.usage_in_bytes": "9000",
        "memory/memory.stat": "inactive_file 5\ntotal_inactive_file 3000",
        "cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000",
    })  # fmt: skip
    assert (memory.free_bytes(CPU), limits.cores()) == (2000, 1)


def test_threads_are_those_that_a_container_has_the_time_of(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(root, "0::/\n", {"cpu.max": "600000 100000"})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    single, pair = World(0, 1, 0, 1, False), World(0, 2, 0, 1, False)
    assert (threads_of(single, CPU), threads_of(pair, CPU)) == (6, 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert threads_of(single, CPU) is None  # torch is content with fewer
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    assert threads_of(pair, CPU) is None
