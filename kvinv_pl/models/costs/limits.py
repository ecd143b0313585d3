"""What a container or a job may take of its machine: memory and cores, by the limits of its cgroups."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

OWN = Path("/proc/self/cgroup")
"""Which cgroups this process is in, under Linux."""
ROOT = Path("/sys/fs/cgroup")
"""Where cgroups are mounted, of version 2 or, in a folder for each controller, of version 1."""


def memory_left() -> int | None:
    """Bytes until the first limit of memory, what the page cache would give back included; None: no limit."""
    found = [
        max(0, limit - used + _in_page_cache(group))
        for group in _groups("memory")
        for limit, used in (
            (_number(group / "memory.max"), _number(group / "memory.current")),
            (_number(group / "memory.limit_in_bytes"), _number(group / "memory.usage_in_bytes")),
        )
        if limit is not None and used is not None
    ]
    return min(found, default=None)


def cores() -> int:
    """The cores that this process may use, at least 1: of its affinity, and of its share of their time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [
        quota / period
        for group in _groups("cpu")
        for quota, period in (
            (_number(group / "cpu.max"), _number(group / "cpu.max", 1)),
            (_number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")),
        )
        if quota is not None and quota > 0 and period
    ]
    return max(1, min(allowed, math.ceil(min(shares, default=allowed))))


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the cgroups that limit this process, from its own to the root."""
    try:
        lines = OWN.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = ROOT / controller if controllers else ROOT
        # in a container, the path may be the host's: of what is not mounted here, there are no files
        cgroup = PurePosixPath(path.lstrip("/"))
        yield from (top / group for group in (cgroup, *cgroup.parents))


def _number(file: Path, place: int = 0) -> int | None:
    """A number of a file; None: there is none, as of "max", which is no limit."""
    try:
        return int(file.read_text(encoding="utf-8").split()[place])
    except (OSError, ValueError, IndexError):
        return None


def _in_page_cache(group: Path) -> int:
    """Bytes that count as used but are given back when memory is short."""
    try:
        lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
        table = {name: int(count) for name, count in (line.split() for line in lines)}
    except (OSError, ValueError):
        return 0
    return table.get("total_inactive_file", table.get("inactive_file", 0))  # the former is of version 1
