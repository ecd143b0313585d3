"""Reconstruction against cost: each way of tuning with more and more steps, and null-text inversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]
from kvinv_plugins.inversions.null_text import NullText  # pyright: ignore[reportMissingImports]
from torch import Tensor

from kvinv_pl.algorithm.inversion import invert
from kvinv_pl.algorithm.method import Scene
from kvinv_pl.algorithm.tuning import reconstruct, squared_errors
from kvinv_pl.attention import Selection
from kvinv_pl.bench.network import Network
from kvinv_pl.data.images.geometry import Geometry, psnr, to_pixels
from kvinv_pl.menagerie import Animal
from kvinv_pl.models.costs import counting
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.models.stable_diffusion import Backbone
from kvinv_pl.optimizers import GaussNewtonDescent

Optimizer = Callable[[list[Tensor]], Any]
WAYS: dict[str, tuple[Optimizer, tuple[int, ...]]] = {
    "Adam 1e-2": (partial(torch.optim.Adam, lr=1e-2), (3, 10)),
    "Adam 3e-2": (partial(torch.optim.Adam, lr=3e-2), (1, 2, 3)),
    "GaussNewtonDescent": (GaussNewtonDescent, (1, 2)),
}
NULL_TEXT = (1, 2, 3, 5, 7, 10)


@dataclass(frozen=True)
class Point:
    """What a way of reconstructing costs a picture, and how close it comes."""

    way: str
    gflops: float
    below_ceiling: float
    """dB of PSNR to the source by which it stays below the VAE round trip."""
    to_round_trip: float
    """dB of PSNR to the VAE round trip."""


class Picture:
    """An animal of the embedded world, inverted at guidance 1, to be reconstructed at guidance w."""

    def __init__(self, denoiser: Denoiser, seed: int, w: float) -> None:
        self.denoiser, self.w = denoiser, w
        animal = Animal.sample(seed)
        drawn = animal.render()
        self.pixels = to_pixels(drawn, Geometry(drawn.size, drawn.size))[None]
        backbone = denoiser.backbone
        with torch.no_grad():
            z_0 = backbone.encode(self.pixels)
            network = Network(denoiser, (z_0.shape[-2], z_0.shape[-1]))
            table, prompt = backbone.step_table(len(denoiser.table)), animal.prompt()
            self.scene = Scene(network, table, z_0, prompt, prompt, w)
            self.contexts = self.scene.contexts[:2, None]
            self.trajectory = invert(denoiser.guided_prediction(self.contexts, 1.0), z_0, denoiser.table)
        self.round_trip = backbone.decode(z_0)
        denoiser.place((z_0.shape[-2], z_0.shape[-1]), slots=1)

    def point(self, way: str, z_0: Tensor, gflops: float) -> Point:
        """The PSNR of z-tilde_0."""
        decoded = self.denoiser.backbone.decode(z_0)
        ceiling = psnr(self.round_trip, self.pixels)
        below = ceiling - psnr(decoded, self.pixels)
        return Point(way, gflops, below, psnr(decoded, self.round_trip))

    def tuned(self, way: str, optimizer: Optimizer, inner_steps: int) -> Point:
        """KV Inversion with so many steps in every phase, each phase beginning with the psi before."""
        denoiser, z, total = self.denoiser, self.trajectory[-1], 0.0
        steps, values = len(denoiser.table), list(denoiser.psi.parameters())
        for cp in denoiser.cps:
            cp.reset()
        eps = denoiser.guided_prediction(self.contexts, self.w)

        def phase(i: int, z: Tensor) -> Tensor:
            pivot, chosen = self.trajectory[steps - 1 - i], optimizer(list(values))
            denoiser.cache.clear()

            def residuals() -> Tensor:
                return (reconstruct(eps, z, denoiser.table, i) - pivot).flatten(1)

            with denoiser.attached().blend(), denoiser.cache.reuse():
                for _ in range(inner_steps):
                    if getattr(chosen, "reads_residuals", False):
                        chosen.step(residuals)
                    else:
                        chosen.zero_grad()
                        squared_errors(pivot, reconstruct(eps, z, denoiser.table, i)).sum().backward()
                        chosen.step()
                with torch.no_grad():
                    return reconstruct(eps, z, denoiser.table, i)

        for i in range(steps):
            if i == 0:  # every phase does the same
                total = steps * counting.flops(lambda: phase(0, self.trajectory[-1]))
                for cp in denoiser.cps:
                    cp.reset()
            z = phase(i, z)
        return self.point(f"{way}, {inner_steps} steps", z, total / 1e9)

    def null_text(self, inner_steps: int) -> Point:
        """Null-text inversion with so many steps at most."""
        held: list[Any] = []

        def work() -> None:
            held.append(NullText(inner_steps).learn(self.scene, self.trajectory.flip(0)).end)

        total = counting.flops(work)
        return self.point(f"null-text, {inner_steps} steps", held[0], total / 1e9)


def points(
    seeds: range, w: float, ways: list[str], null_text_steps: tuple[int, ...], steps: int = 50
) -> list[Point]:
    """The mean over the pictures of every way with each of its numbers of steps."""
    denoiser = Denoiser(Backbone.load("menagerie"), FullKV, Selection("decoder"), steps)
    found: dict[str, list[Point]] = {}
    for seed in seeds:
        picture = Picture(denoiser, seed, w)
        done = [picture.null_text(n) for n in null_text_steps]
        done += [picture.tuned(way, WAYS[way][0], n) for way in ways for n in WAYS[way][1]]
        for point in done:
            found.setdefault(point.way, []).append(point)
    return [_mean(way, row) for way, row in found.items()]


def _mean(way: str, row: list[Point]) -> Point:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return Point(
        way,
        mean([point.gflops for point in row]),
        mean([point.below_ceiling for point in row]),
        mean([point.to_round_trip for point in row]),
    )


def cheapest(found: list[Point], within: float) -> Point | None:
    """The cheapest point that stays at most `within` dB below the VAE round trip."""
    return min((p for p in found if p.below_ceiling <= within), key=lambda p: p.gflops, default=None)
