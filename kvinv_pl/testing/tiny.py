"""A U-Net of two levels with random weights, as methods see a network; its prompts need no text model."""

import hashlib
from collections.abc import Mapping
from functools import cache

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.ddim import StepTable
from kvinv_pl.errors import UserError
from kvinv_pl.models.controllable import ControllableUNet
from kvinv_pl.testing.harness import seeded

GRID = (4, 6)  # not square
LENGTH, WIDTH, CHANNELS = 10, 8, 4


class TinyModel(ControllableUNet):
    """The `Model` of `kvinv_pl.algorithm.method`; every word is a token, and always of the same embedding."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # always the same weights
            unet = UNet2DConditionModel(
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                layers_per_block=1,
                block_out_channels=(8, 8),
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                attention_head_dim=2,
                norm_num_groups=4,
                cross_attention_dim=WIDTH,
            )
        super().__init__(unet.requires_grad_(False).eval(), GRID)

    def embed(self, prompts: list[str]) -> Float[Tensor, "n L d"]:
        """A drawn vector for every word, and for the start and the end."""
        return self.embed_with(prompts, {})

    def vectors(self, word: str) -> Float[Tensor, "1 e"]:
        """The drawn one."""
        return _drawn(word)[None].clone()

    def embed_with(
        self, prompts: list[str], words: Mapping[str, Float[Tensor, "1 e"]]
    ) -> Float[Tensor, "n L d"]:
        """The same with other vectors for some words."""
        rows = [["<", *prompt.split(), *[">"] * LENGTH][:LENGTH] for prompt in prompts]
        return torch.stack(
            [torch.stack([words[word][0] if word in words else _drawn(word) for word in row]) for row in rows]
        )

    def tokens(self, prompt: str) -> list[str]:
        """Its words."""
        return [f"{word}</w>" for word in prompt.split()]

    def places(self, prompt: str) -> list[range]:
        """After the start, in one chunk."""
        return [range(1, 1 + len(prompt.split()))]

    def positions(self, prompt: str, word: str) -> list[int]:
        """The places of a word."""
        found = [place for place, other in enumerate(prompt.split(), 1) if other == word]
        if not found:
            raise UserError(f"{word!r} is not in the prompt {prompt!r}")
        return found

    def predict(
        self, z: Float[Tensor, "rows c h w"], t: Tensor, contexts: Float[Tensor, "branches rows L d"]
    ) -> Float[Tensor, "branches rows c h w"]:
        """All branches in one forward."""
        count, rows = len(contexts), len(z)
        given = contexts.expand(-1, rows, -1, -1).flatten(0, 1)
        out = self.unet(z.repeat(count, 1, 1, 1), t.expand(rows).repeat(count), given, return_dict=False)[0]
        return out.unflatten(0, (count, rows))


def table(predicts_v: bool = False) -> StepTable:
    """Three steps of Stable Diffusion's schedule."""
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()).cumprod(0)
    return StepTable.through(torch.tensor([667, 334, 1]), alphas, float(alphas[0]), predicts_v)


def latents() -> Float[Tensor, "1 c h w"]:
    """Those of the picture."""
    return torch.randn(1, CHANNELS, *GRID, generator=seeded(0))


@cache
def _drawn(word: str) -> Float[Tensor, " d"]:
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=6).digest(), "big")
    return torch.randn(WIDTH, generator=seeded(seed))
