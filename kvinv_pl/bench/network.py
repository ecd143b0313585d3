"""A loaded checkpoint as methods see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from kvinv_pl.algorithm.method import Control
from kvinv_pl.attention.control import controlling
from kvinv_pl.attention.cross_attention import cross_attentions
from kvinv_pl.attention.sites import self_attentions
from kvinv_pl.errors import UserError
from kvinv_pl.models.prompts import word_positions
from kvinv_pl.models.stable_diffusion import Backbone


class Network:
    """The `Model` of `kvinv_pl.algorithm.method`, for latents of one size."""

    def __init__(self, backbone: Backbone, grid: tuple[int, int]) -> None:
        """Find the attentions; nothing is put into the U-Net."""
        sites = self_attentions(backbone.unet, grid)
        self.backbone, self.unet = backbone, backbone.unet
        self.self_attentions = tuple(site.path for site in sites)
        self.cross_attentions = tuple(cross_attentions(backbone.unet))
        self.modules = tuple(path for path, _ in backbone.unet.named_modules())
        self._grids = {site.tokens: site.grid for site in sites}

    def embed(self, prompts: list[str]) -> Float[Tensor, "n L d"]:
        """The prompts as the U-Net reads them."""
        return self.backbone.embed(prompts)

    def tokens(self, prompt: str) -> list[str]:
        """The prompt's tokens, without those of its start and its end, as far as they are read."""
        tokenizer = self.backbone.tokenizer
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return [str(t) for t in tokenizer.convert_ids_to_tokens(ids)][: self.backbone.prompt_length - 2]

    def positions(self, prompt: str, word: str) -> list[int]:
        """The places of a word's tokens in a prompt."""
        return word_positions(self.backbone, prompt, word)

    def predict(
        self, z: Float[Tensor, "rows c h w"], t: Tensor, contexts: Float[Tensor, "branches rows L d"]
    ) -> Float[Tensor, "branches rows c h w"]:
        """All branches in one forward."""
        count, rows = len(contexts), len(z)
        out = self.backbone.predict(
            z.repeat(count, 1, 1, 1), t.expand(count * rows), contexts.expand(-1, rows, -1, -1).flatten(0, 1)
        )
        return out.unflatten(0, (count, rows))

    @contextmanager
    def controlled(self, i: int, control: Control) -> Iterator[None]:
        """The control's attentions and features, at step i; afterwards the U-Net is as it was."""
        with ExitStack() as stack:
            if control.attentions:
                middle = partial(control.attend, i)
                stack.enter_context(controlling(self.unet, tuple(control.attentions), self._grids, middle))
            for path in control.features:
                stack.enter_context(self._module(path).register_forward_hook(_hook(i, path, control)))
            yield

    def _module(self, path: str) -> nn.Module:
        if path not in self.modules:
            raise UserError(
                f"{path!r} is no module of this U-Net: expected a path such as {self.modules[-1]}"
            )
        return self.unet.get_submodule(path)


def _hook(i: int, path: str, control: Control) -> Any:
    def through(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return control.feature(i, path, out.unflatten(0, (-1, 2))).flatten(0, 1)

    return through
