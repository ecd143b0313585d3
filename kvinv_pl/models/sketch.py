"""A checkpoint without weights, with psi attached: what its forwards take is counted and not run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from kvinv_pl.algorithm.guidance import guided
from kvinv_pl.attention.attachment import Attachment, attach
from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.attention.sites import Selection, Site, select, self_attentions
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoint import Outline
from kvinv_pl.models.counting import FusedAttention, LiveMemory, flops
from kvinv_pl.models.feature_cache import FeatureCache
from kvinv_pl.models.memory import COPIES, bytes_of_bars, saved_bytes

TOKENS = 77  # of a prompt
META = torch.device("meta")


@dataclass(frozen=True)
class Costs:
    """What the network takes for latents of one size: bytes, and floating point operations."""

    weights: int
    """Of the U-Net and of the VAE, which is in fp32."""
    slot: int
    """Of tuning one picture, beside the weights."""
    decoding: int
    """Of one picture through the VAE, beside the weights."""
    row: float
    """A forward of the U-Net for one row."""
    forward: float
    """A forward of tuning, with all of its branches."""
    inner_step: float
    """A forward and backward of tuning, what comes before the first upgraded layer being computed already."""


class Sketch:
    """The U-Net and the VAE of a checkpoint on meta, for latents of one size; psi is one slot wide."""

    def __init__(
        self,
        outlined: Outline,
        variant: Callable[[Site], CPAttention],
        selection: Selection,
        grid: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        """Attach psi.

        Args:
            outlined: The checkpoint.
            variant: Makes the variant at a site.
            selection: The sites.
            grid: Height and width of the latents.
            dtype: In which the U-Net is held.
        """
        self.unet, self.vae, self.grid, self.dtype = outlined.unet, outlined.vae, grid, dtype
        for value in self.unet.parameters():  # .to() of diffusers warns of what its own loading would keep
            value.data = value.data.to(dtype)
        self.unet.requires_grad_(False).eval()
        self.vae.requires_grad_(False).eval()
        self.sites = select(self_attentions(self.unet, grid), selection)
        self.psi = {site.path: variant(site) for site in self.sites}
        factor = outlined.sizes.vae_factor
        with META:
            for cp in self.psi.values():
                cp.to(META)
                if cp.wants_mask:
                    cp.bind(torch.ones(1, grid[0] * factor, grid[1] * factor))
        self.attachment: Attachment = attach(self.unet, self.psi)
        self._config: Any = self.unet.config

    def values(self) -> list[Tensor]:
        """Every value of psi that is stored, parameters and buffers."""
        return [value for cp in self.psi.values() for value in cp.state_dict().values()]

    def costs(self, branches: int, keeps_bars: bool) -> Costs:
        """Count, with so many branches in tuning.

        Args:
            branches: Of tuning.
            keeps_bars: Whether a phase ends with K-bar and V-bar of every site.
        """
        learned = [value for cp in self.psi.values() for value in cp.parameters()]
        weights = [*self.unet.parameters(), *self.vae.parameters()]
        with torch.no_grad():
            row = flops(lambda: self._forward(1))
        try:
            with self.attachment.blend(), FusedAttention():
                saved = saved_bytes(lambda: self._forward(branches), [*weights, *learned])
                first, inner = self._inner_step(branches, learned)
        except (RuntimeError, NotImplementedError) as error:
            kind = type(next(iter(self.psi.values()))).__name__
            raise UserError(f"what {kind} takes cannot be counted without values: {error}") from error
        psi = COPIES * sum(value.nbytes for value in learned)
        bars = bytes_of_bars(self.sites, branches, self.dtype) if keeps_bars else 0
        with torch.no_grad(), FusedAttention(), LiveMemory(weights) as decoding:
            self.vae.decode(cast(Any, self.latents(1, torch.float32)), return_dict=False)
        known = sum(value.nbytes for value in weights)
        return Costs(known, saved + psi + bars, decoding.peak - known, row, first, inner)

    def _inner_step(self, branches: int, learned: list[nn.Parameter]) -> tuple[float, float]:
        """Operations of a phase's first forward, and of an inner step after it."""
        cache = FeatureCache(self.unet, self.psi.values())

        def step() -> None:
            loss = self._forward(branches).float().square().sum()
            if learned:
                loss.backward()

        with cache.kept():
            with torch.no_grad():
                first = flops(lambda: self._forward(branches))
            return first, flops(step)

    def latents(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Latents of so many rows."""
        return torch.zeros(rows, self._config["in_channels"], *self.grid, dtype=dtype, device=META)

    def _forward(self, branches: int) -> Tensor:
        context = self._config["cross_attention_dim"]
        width = context if isinstance(context, int) else context[0]
        prompts = torch.zeros(branches, TOKENS, width, dtype=self.dtype, device=META)
        t = torch.zeros(branches, dtype=torch.long, device=META)
        out = self.unet(
            self.latents(branches, self.dtype), t, encoder_hidden_states=prompts, return_dict=False
        )
        return guided(out[0].float()[:, None], (1.0,))
