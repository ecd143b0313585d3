"""Algorithm 1 in plain torch, for tests to compare a fit with."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import fits
import torch
from fits import SOURCE, TARGET
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch import Tensor

from kvinv_pl.algorithm.ddim import move
from kvinv_pl.attention import Selection, select, self_attentions
from kvinv_pl.attention.attachment import attach
from kvinv_pl.data.images.geometry import fit_geometry, to_image, to_pixels
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.models.stable_diffusion import Backbone

W, LR = 2.0, 0.1


class ByHand:
    """Algorithm 1 in plain torch: no Lightning, no module, and a new Adam for every timestep."""

    def __init__(self, image: Path, steps: int = 3, optimizer: Any = None) -> None:
        self.optimizer = optimizer or partial(torch.optim.Adam, lr=LR)
        self.backbone = backbone = Backbone.load(str(fits.checkpoint()))
        self.table = backbone.step_table(steps)
        opened = open_picture(image).image
        self.geometry = fit_geometry(opened.size, backbone.sample_size, backbone.multiple, "keep")
        z_0 = backbone.encode(to_pixels(opened, self.geometry)[None])
        self.empty, self.source, self.target = backbone.embed(["", SOURCE, TARGET]).unsqueeze(1)
        self.pivots = [z_0]
        with torch.no_grad():
            for i in reversed(range(steps)):
                t = self.table.timesteps[i][None]
                eps = backbone.predict(self.pivots[-1], t, self.source)
                self.pivots.append(move(self.pivots[-1], eps, self.table.alphas[i + 1], self.table.alphas[i]))

    def guided(self, z: Tensor, i: int, prompt: Tensor) -> Tensor:
        t = self.table.timesteps[i].expand(2)
        eps_u, eps_c = self.backbone.predict(torch.cat([z, z]), t, torch.cat([self.empty, prompt])).split(1)
        return move(z, eps_u + W * (eps_c - eps_u), self.table.alphas[i], self.table.alphas[i + 1])

    def tune(
        self, inner_steps: int, carry: bool
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], list[list[float]]]:
        """Psi and z-tilde of every step, and the mean error before each inner step."""
        return self._tune(inner_steps, carry, None)

    def tune_at_pivots(self, inner_steps: int) -> list[dict[str, Tensor]]:
        """Psi of every step, tuned on its own and from its own pivot."""
        return self._tune(inner_steps, False, None, at_pivots=True)[0]

    def settle(
        self, starts: list[dict[str, Tensor]], inner_steps: int, carry: bool
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], list[list[float]]]:
        """As `tune`, with psi starting there, and what changed at the step before on top with `carry`."""
        return self._tune(inner_steps, carry, starts)

    def _tune(
        self, inner_steps: int, carry: bool, starts: list[dict[str, Tensor]] | None, at_pivots: bool = False
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], list[list[float]]]:
        sites = select(self_attentions(self.backbone.unet, (8, 8)), Selection("decoder"))
        psi = {site.path: FullKV(site) for site in sites}
        parameters = [parameter for cp in psi.values() for parameter in cp.parameters()]
        z, stored, reached, losses = self.pivots[-1], [], [], []
        attachment = attach(self.backbone.unet, psi)
        for i in range(len(self.table)):
            if not carry:
                for cp in psi.values():
                    cp.reset()
            if starts is not None:
                for path, cp in psi.items():
                    for name, value in cp.named_parameters():
                        before = stored[-1][f"{path}.{name}"] - starts[i - 1][f"{path}.{name}"] if i else 0.0
                        value.data = starts[i][f"{path}.{name}"] + (before if carry else 0.0)
            if at_pivots:
                z = self.pivots[len(self.table) - i]
            optimizer, pivot = self.optimizer(parameters), self.pivots[len(self.table) - 1 - i]
            losses.append([])
            for _ in range(inner_steps):
                with attachment.blend():
                    loss = (pivot - self.guided(z, i, self.source)).square().sum()
                losses[-1].append(loss.item() / z.numel())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with attachment.blend(), torch.no_grad():
                z = self.guided(z, i, self.source)
            values = {f"{path}.{name}": p for path, cp in psi.items() for name, p in cp.named_parameters()}
            stored.append({name: value.detach().clone() for name, value in values.items()})
            reached.append(z[0])
        attachment.detach()
        return stored, reached, losses

    @torch.no_grad()
    def plain_edit(self) -> Image.Image:
        z = self.pivots[-1]
        for i in range(len(self.table)):
            z = self.guided(z, i, self.target)
        return to_image(self.backbone.decode(z)[0], self.geometry)
