"""MasaCtrl (Cao et al., 2023): mutual self-attention, plain and guided by masks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kvinv_pl.algorithm.method import Attending, Control, Inverted, Scene, naming_grid, require_shares
from kvinv_pl.errors import UserError


@dataclass(frozen=True)
class MasaCtrl:
    """Mutual self-attention (Cao et al., 2023, Eq. 3): the target's queries read the source's K and V.

    With words, it is guided by masks (Eqs. 4 and 5): cross-attention maps of the words, of the source and of
    the target, are cut at a threshold; the target's foreground reads the source's foreground alone, and its
    background the rest. The maps are those of the same step from layers before, 16 x 16 of Stable
    Diffusion's and of another U-Net the coarsest that several layers have.

    Args:
        start: The share of the steps, from noise, after which it begins; published: 4 of 50.
        layer: The self-attention from which on, in the order of the forward; left out, 10 of Stable
            Diffusion's 16, and the same share of another U-Net's.
        word: The word of both prompts whose attention is the mask; default: no masks.
        threshold: Threshold of a mask, in a map from 0 to 1.
        empty_source: Whether the source is inverted and sampled without a prompt, as published for
            photographs; without masks only.
        guidance: Guidance scale of the target, unless another is given; as published.
    """

    start: float = 0.08
    layer: int | None = None
    word: str | None = None
    threshold: float = 0.1
    empty_source: bool = True
    guidance: float | None = 7.5
    properties = ("keeps equal prompts",)
    idle = {"start": 1.0}  # noqa: RUF012

    def __post_init__(self) -> None:
        """Refuse masks by the words of an empty prompt, and a start that is no share."""
        require_shares(start=self.start)
        if self.word is not None and self.empty_source:
            raise UserError(
                "empty_source: expected false with a word, which is looked for in the source prompt"
            )

    def control(self, scene: Scene, inverted: Inverted) -> Control:
        """Take over the later self-attentions."""
        every = scene.model.self_attentions
        layer = round(len(every) * 10 / 16) if self.layer is None else self.layer
        if not 0 <= layer < len(every):
            raise UserError(f"layer: expected 0 to {len(every) - 1}, got {layer}")
        first = int(self.start * len(scene.table) + 0.5)
        if self.word is None:
            return MutualAttention(every[layer:], first)
        positions = [scene.model.positions(prompt, self.word) for prompt in (scene.source, scene.target)]
        return MaskedMutualAttention(
            every[layer:], first, scene.model.cross_attentions, positions, self.threshold
        )


class MutualAttention(Control):
    """Eq. 3 from one step and one layer on."""

    def __init__(self, layers: Sequence[str], first: int) -> None:
        """Take over `layers` from step `first` on."""
        self.attentions = self.layers = tuple(layers)
        self.first = first

    def attend(self, i: int, at: Attending) -> Float[Tensor, "branches 2 tokens dim"]:
        """The target's queries with the K and V of the source's same branch."""
        if i < self.first:
            return at.attend(at.q, at.k, at.v)
        return at.attend(at.q, at.k[:, :1].expand_as(at.k), at.v[:, :1].expand_as(at.v))


class MaskedMutualAttention(MutualAttention):
    """Eqs. 4 and 5: masks from the attention maps of the step, as far as the forward has come."""

    def __init__(
        self,
        layers: Sequence[str],
        first: int,
        cross: Sequence[str],
        positions: list[list[int]],
        threshold: float,
    ) -> None:
        """Watch the cross-attentions beside."""
        super().__init__(layers, first)
        self.attentions = (*self.layers, *cross)
        self.positions, self.threshold = positions, threshold
        self._maps: dict[tuple[int, int], list[Tensor]] = {}

    def before(self, i: int, z: Float[Tensor, "2 c h w"]) -> Float[Tensor, "2 c h w"]:
        """Forget the maps of the step before."""
        self._maps = {}
        return z

    def masks(self) -> Bool[Tensor, "2 h w"]:
        """The foreground of source and target, cut from the maps that were seen."""
        grid = naming_grid({grid: len(maps) for grid, maps in self._maps.items()})
        mean = torch.stack(self._maps[grid]).mean(0)
        least, most = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
        return (mean - least) / (most - least).clamp_min(1e-12) > self.threshold

    def attend(self, i: int, at: Attending) -> Float[Tensor, "branches 2 tokens dim"]:
        """Keep a map of the words, or attend within foreground and background."""
        if at.cross:
            attention = at.probabilities(at.q, at.k)[-1].mean(1)
            words = enumerate(self.positions)
            maps = [attention[row][:, places].mean(-1).view(at.grid) for row, places in words]
            self._maps.setdefault(at.grid, []).append(torch.stack(maps))
            return at.attend(at.q, at.k, at.v)
        if i < self.first or not self._maps:
            return super().attend(i, at)
        fitted = F.interpolate(self.masks()[None].float(), at.grid, mode="nearest")[0].flatten(1) > 0.5
        source, target = fitted[0], fitted[1]
        # a query and a key on one side; a side that the source lacks is read as a whole
        alike = target[:, None] == source[None]
        alike = alike | ~alike.any(1, keepdim=True)
        same_query = torch.ones_like(alike)
        mask = torch.stack([same_query, alike])[None]
        return at.attend(at.q, at.k[:, :1].expand_as(at.k), at.v[:, :1].expand_as(at.v), mask)
