"""The training pictures: drawn once, kept in one file, read row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from kvinv_pl.bench.worker import end_with_parent
from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import Animal, Twice, acting_otherwise

TRAINING_SEEDS = 900_000  # 0 up; 900,000 to 999,999 are for choosing, from 1,000,000 on for reporting
CHOOSING_SEED = 900_000
REPORTING_SEED = 1_000_000


Sampling = Callable[[int], Animal | Twice]  # the scene of a seed
NAMES: dict[Sampling, str] = {Animal.sample: "pictures", Twice.sample: "pairs", acting_otherwise: "seconds"}


def drawn(seeds: range, size: int, sample: Sampling = Animal.sample) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, size, size) and masks (n, 1, size, size), uint8, of these seeds' scenes."""
    canvases = [sample(seed).drawn(size=size) for seed in seeds]
    rgb = np.stack([np.asarray(canvas.picture()) for canvas in canvases])
    mask = np.stack([np.asarray(canvas.mask()) for canvas in canvases])
    return torch.from_numpy(rgb).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(mask)[:, None].byte()


def _drawn(job: tuple[int, int, int, Sampling]) -> tuple[np.ndarray, np.ndarray]:
    rgb, mask = drawn(range(job[0], job[1]), job[2], job[3])
    return rgb.numpy(), mask.numpy()


def _rows(of: Callable[[int], np.ndarray], seeds: range) -> np.ndarray:
    return np.stack([of(seed) for seed in seeds])


def by_seeds(of: Callable[[int], np.ndarray], count: int) -> np.ndarray:
    """What `of` gives for each of the first `count` seeds, by as many processes as there are cores."""
    jobs = [range(first, min(first + 500, count)) for first in range(0, count, 500)]
    return np.concatenate(in_processes(partial(_rows, of), jobs))


def in_processes(work: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
    """`work` of every job, in processes if there are several."""
    if len(jobs) == 1:
        return [work(jobs[0])]
    # Not by fork: the child of a process in which torch has run in threads can wait for ever.
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        return list(pool.map(work, jobs))


def pictures(work: Path, count: int, size: int, sample: Sampling = Animal.sample) -> tuple[Tensor, Tensor]:
    """Pictures and masks of the first `count` training seeds, drawn when no file holds as many."""
    if not 1 <= count <= TRAINING_SEEDS:
        raise UserError(f"--count must be 1 to {TRAINING_SEEDS}, the number of training seeds; got {count}")
    name = NAMES[sample]
    larger = sorted((number, file) for file, number in _files(work, name, size) if number >= count)
    file = larger[0][1] if larger else work / f"{name}-{count}-{size}.pt"
    if not larger:
        print(f"drawing {count} {name} of {size} pixels", flush=True)
        jobs = [(first, min(first + 500, count), size, sample) for first in range(0, count, 500)]
        parts = in_processes(_drawn, jobs)
        save(tuple(torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True)), file)
    rgb, mask = torch.load(file, mmap=True)
    return rgb[:count], mask[:count]


def _files(work: Path, name: str, size: int) -> list[tuple[Path, int]]:
    return [(file, int(file.stem.split("-")[1])) for file in work.glob(f"{name}-*-{size}.pt")]


def save(tensors: Any, file: Path) -> None:
    """torch.save that leaves no half-written file behind under the name that is looked for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(".part")
    torch.save(tensors, half)
    half.replace(file)


def unit(rgb: Tensor) -> Tensor:
    """From 0..255 to -1..1."""
    return rgb.float() / 127.5 - 1.0


def psnr(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Decibels, per picture of -1..1, over the frame or where the mask (n, 1, h, w) is 1."""
    weight = torch.ones_like(x[:, :1]) if mask is None else mask.to(x.dtype)
    squares = (x - y).square().mean(1, keepdim=True)
    mean = (squares * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp_min(1)
    return 10 * torch.log10(4 / mean.clamp_min(1e-10))


class Rows(Dataset[Any]):
    """Rows of tensors that lie in memory."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.tensors[0])

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        """A whole batch at once."""
        return [tensor[rows] for tensor in self.tensors]


class Both(Dataset[Any]):
    """The rows of one data set and then those of another."""

    def __init__(self, first: Rows, second: Rows) -> None:
        """Rows of the same kinds of tensors."""
        self.first, self.second = first, second

    def __len__(self) -> int:
        """The number of rows of both."""
        return len(self.first) + len(self.second)

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        """A whole batch at once; those of the first come first."""
        here = len(self.first)
        parts = [self.first.__getitems__([row for row in rows if row < here])]
        parts.append(self.second.__getitems__([row - here for row in rows if row >= here]))
        return [torch.cat(pair) for pair in zip(*parts, strict=True)]


class Side(Dataset[Any]):
    """Two data sets side by side: of a batch, a fifth of the rows are of the first."""

    def __init__(self, first: Rows, second: Rows) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        """The number of rows of the second."""
        return len(self.second)

    def __getitems__(self, rows: list[int]) -> list[list[Tensor]]:
        """A batch of each."""
        many = len(rows) // 5
        firsts = [row % len(self.first) for row in rows[:many]]
        return [self.first.__getitems__(firsts), self.second.__getitems__(rows[many:])]


def loader(rows: Rows | Both | Side, batch: int) -> DataLoader[Any]:
    """Batches of random rows, without end."""
    return DataLoader(rows, batch, sampler=RandomSampler(rows, num_samples=10**9), collate_fn=lambda b: b)
