"""A checkpoint without weights, with psi attached: what its forwards take is counted and not run."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from kvinv_pl.algorithm.editing import guided
from kvinv_pl.attention.attachment import Attachment, attach
from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.attention.sites import Selection, Site, context_width, select, self_attentions
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoint import MetaCheckpoint
from kvinv_pl.models.checkpoints.families import clip_tokenizer
from kvinv_pl.models.costs.counting import FusedAttention, LiveMemory, flops
from kvinv_pl.models.costs.memory import COPIES, bytes_of_bars, saved_bytes
from kvinv_pl.models.feature_cache import FeatureCache
from kvinv_pl.models.text.prompt_reader import PromptReader
from kvinv_pl.models.text.prompt_syntax import PromptSyntax
from kvinv_pl.models.vae_tiles import tile

TOKENS = 77  # of a chunk of a prompt
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
    tiled: bool
    """Whether the VAE takes the picture by tiles."""
    row: float
    """A forward of the U-Net for one row."""
    forward: float
    """A forward of tuning, with all of its branches."""
    inner_step: float
    """A forward and backward of tuning, what comes before the first upgraded layer being computed already."""


class MetaModel:
    """The U-Net and the VAE of a checkpoint on meta, for latents of one size; psi is one slot wide."""

    def __init__(
        self,
        checkpoint: MetaCheckpoint,
        variant: Callable[[Site], CPAttention],
        selection: Selection,
        grid: tuple[int, int],
        dtype: torch.dtype,
        tokens: int = TOKENS,
    ) -> None:
        """Attach psi; `grid` is the latents' height and width, `tokens` those of the prompts."""
        self.unet, self.vae, self.grid, self.dtype = checkpoint.unet, checkpoint.vae, grid, dtype
        self.tokens, self.device = tokens, META
        for value in self.unet.parameters():  # .to() of diffusers warns of what its own loading would keep
            value.data = value.data.to(dtype)
        self.unet.requires_grad_(False).eval()
        self.vae.requires_grad_(False).eval()
        self.sites = select(self_attentions(self.unet, grid), selection)
        self.psi = {site.path: variant(site) for site in self.sites}
        self.factor = checkpoint.sizes.vae_factor
        with META:
            for cp in self.psi.values():
                cp.to(META)
        self._bind()
        self.attachment: Attachment = attach(self.unet, self.psi)
        self._config: Any = self.unet.config

    def materialize(self, device: torch.device) -> None:
        """Give the U-Net and psi memory on a device, and values that are all alike."""
        for model in (self.unet, *self.psi.values()):
            model.to_empty(device=device)
            for value in (*model.parameters(), *model.buffers()):
                value.data.fill_(0.01)  # finite, and no number that a CPU is slow with
        self.device = device
        self._bind()

    def _bind(self) -> None:
        height, width = (side * self.factor for side in self.grid)
        with self.device:
            for cp in self.psi.values():
                if cp.wants_mask:
                    cp.bind(torch.ones(1, height, width))

    def values(self) -> list[Tensor]:
        """Every value of psi that is stored, parameters and buffers."""
        return [value for cp in self.psi.values() for value in cp.state_dict().values()]

    def costs(self, branches: int, keeps_bars: bool) -> Costs:
        """Count, with so many branches in tuning, and K-bar and V-bar kept or not."""
        learned = self._learned()
        weights = [*self.unet.parameters(), *self.vae.parameters()]
        with torch.no_grad():
            row = flops(lambda: self._forward(1))
        try:
            with FusedAttention():
                with self.attachment.blend():
                    saved = saved_bytes(lambda: self._forward(branches), [*weights, *learned])
                with self.tuning(branches) as (forward, inner_step):
                    first, inner = flops(forward), flops(inner_step)
        except (RuntimeError, NotImplementedError) as error:
            kind = type(next(iter(self.psi.values()))).__name__
            raise UserError(f"what {kind} takes cannot be counted without values: {error}") from error
        psi = COPIES * sum(value.nbytes for value in learned)
        bars = bytes_of_bars(self.sites, branches, self.dtype) if keeps_bars else 0
        tiled = tile(self.vae, *(side * self.factor for side in self.grid))
        with torch.no_grad(), FusedAttention(), LiveMemory(weights) as decoding:
            self.vae.decode(cast(Any, self.latents(1, torch.float32)), return_dict=False)
        known = sum(value.nbytes for value in weights)
        return Costs(known, saved + psi + bars, decoding.peak - known, tiled, row, first, inner)

    @contextmanager
    def tuning(self, branches: int) -> Iterator[tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
        """A phase's first forward, and an inner step after it."""
        cache, learned = FeatureCache(self.unet, self.psi.values()), self._learned()

        def forward() -> Tensor:
            cache.clear()
            with torch.no_grad():
                return self._forward(branches)

        def inner_step() -> Tensor:
            loss = self._forward(branches).float().square().sum()
            if learned:
                loss.backward()
            return loss.detach()

        with self.attachment.blend(), cache.reuse():
            yield forward, inner_step

    def _learned(self) -> list[nn.Parameter]:
        return [value for cp in self.psi.values() for value in cp.parameters()]

    def latents(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Latents of so many rows."""
        return torch.zeros(rows, self._config["in_channels"], *self.grid, dtype=dtype, device=self.device)

    def _forward(self, branches: int) -> Tensor:
        width = context_width(self._config)
        prompts = torch.zeros(branches, self.tokens, width, dtype=self.dtype, device=self.device)
        t = torch.zeros(branches, dtype=torch.long, device=self.device)
        out = self.unet(
            self.latents(branches, self.dtype), t, encoder_hidden_states=prompts, return_dict=False
        )
        return guided(out[0].float()[:, None], (1.0,))


def prompt_tokens(prompts: Iterable[str], syntax: PromptSyntax) -> int:
    """The tokens of what a forward reads of prompts together, by CLIP's tokenizer: a chunk, or several."""
    if syntax == "plain":
        return TOKENS
    words = clip_tokenizer("<|endoftext|>")
    config: Any = CLIPTextConfig(num_hidden_layers=0, max_position_embeddings=TOKENS)
    with META:
        return PromptReader(words, CLIPTextModel(config), syntax).length_of(prompts)
