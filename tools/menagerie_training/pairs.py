"""Pairs of pictures of one animal: how the second reads the first, and what of it the drawing knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor
from true_correspondence import PartsCanvas, correspondence

from kvinv_pl.menagerie import Animal, acting_otherwise
from menagerie_training.pictures import by_seeds, save

FINE = 4  # pixels a side of a token of the largest grid in the drawings that correspondences are read from
ANIMAL = 3.0  # how much more the error of the animal counts
# The second colour counts so many times a whole picture, however little there is of it, so that a thin
# collar is learned as stripes are; a single token of it no more than MOST.
SECOND, MOST = 0.3, 30.0


@dataclass(frozen=True)
class Known:
    """What the drawings know of pairs: rows are pairs, tokens row by row."""

    corresponding: dict[int, Tensor]
    """By their number: for each token of the second, the first's that shows the same, or -1; (n, tokens)."""
    weight: Tensor
    """How much the error of each of the second's tokens counts, on average 1; (n, side, side)."""

    def of(self, pairs: Tensor) -> Known:
        """That of some of the pairs."""
        rows = {tokens: found[pairs] for tokens, found in self.corresponding.items()}
        return Known(rows, self.weight[pairs])


def _known(grids: Sequence[int], seed: int) -> np.ndarray:
    """All that is known of one pair, one after another."""
    first, second, size = Animal.sample(seed), acting_otherwise(seed), grids[0] * FINE
    before, after = (PartsCanvas(animal, animal.action, size) for animal in (first, second))
    parts = second.parts(size=size)
    of_animal, of_second = (
        drawn.astype(float).reshape(grids[0], FINE, grids[0], FINE).mean((1, 3)).ravel()
        for drawn in (after.shape > 0, parts["marks"] | parts["accent"])
    )
    share = of_second / max(of_second.mean(), 1e-6)
    tokens = 1 + ANIMAL * of_animal + np.minimum(SECOND * share, MOST)
    return np.concatenate([tokens / tokens.mean(), *(correspondence(before, after, grid) for grid in grids)])


def knowledge(work: Path, count: int, grids: Sequence[int]) -> Known:
    """What is known of the pairs of the first `count` seeds, the largest grid first; kept in a file."""
    file = work / f"known-{count}-{'-'.join(map(str, grids))}.pt"
    if not file.exists():
        print(f"finding what corresponds in {count} pairs", flush=True)
        save(torch.from_numpy(by_seeds(partial(_known, tuple(grids)), count)).float(), file)
    tokens = [grid * grid for grid in (grids[0], *grids)]
    weight, *found = torch.load(file).split(tokens, 1)
    corresponding = {each.shape[1]: each.long() for each in found}
    return Known(corresponding, weight.unflatten(1, (grids[0], grids[0])))


def nearness(tokens: int) -> Tensor:
    """How near two tokens of a square grid are: 1 the same, less for its eight neighbours, else 0."""
    side = round(tokens**0.5)
    where = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    squares = (where[:, None] - where).square().sum(-1)
    return torch.exp(-squares) * (squares <= 2)


@dataclass(eq=False)
class Pairs:
    """The pairs of a batch: its last 2 `count` rows are their firsts and then their seconds."""

    count: int = 0
    own: bool = False
    """Whether a second reads its own keys and values beside the first's."""
    known: Known | None = None
    _missed: list[tuple[int, Tensor]] = field(default_factory=list)

    def note(self, tokens: int, missed: Tensor) -> None:
        """Add what one self-attention missed, (count,)."""
        self._missed.append((tokens, missed.mean()))

    def missed(self) -> Tensor | float:
        """How little the seconds read of what corresponds, over all self-attentions so far.

        By their number of tokens: on large grids it is learned last, and matters most to small marks.
        """
        tokens = sum(number for number, _ in self._missed)
        return sum(number / tokens * each for number, each in self._missed)


class ReadingTheFirst(AttnProcessor):
    """Self-attention in which a batch's last pictures read those before them, as in a series of pictures.

    A first reads itself; its second reads the first's keys and values.
    """

    def __init__(self) -> None:
        self.pairs = Pairs()

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend; as `AttnProcessor` does without pairs."""
        count = self.pairs.count
        if not count:
            return super().__call__(attn, hidden_states, *args, **kwargs)
        others, seconds = hidden_states[:-count], hidden_states[-count:]
        read = others[-count:]
        if self.pairs.own:
            read = torch.cat([read, seconds], 1)
        layer: Any = attn  # whose projections diffusers types as optional
        q, k, v = (
            attn.head_to_batch_dim(to(hidden))
            for to, hidden in ((layer.to_q, seconds), (layer.to_k, read), (layer.to_v, read))
        )
        scores = attn.get_attention_scores(q, k)
        if self.pairs.known:
            self._note(scores, self.pairs.known)
        attended = layer.to_out[0](attn.batch_to_head_dim(torch.bmm(scores, v)))
        return torch.cat([super().__call__(attn, others), attended])

    def _note(self, scores: Tensor, known: Known) -> None:
        """How little of what is read lies near what corresponds, as the logarithm of the heads' mean."""
        count, tokens = self.pairs.count, scores.shape[1]
        heads = scores[..., :tokens].float().unflatten(0, (count, -1)).mean(1)
        at = known.corresponding[tokens]
        near = (heads * nearness(tokens)[at.clamp_min(0)].to(heads)).sum(-1).clamp_min(1e-6)
        side = round(tokens**0.5)
        pooled = torch.nn.functional.adaptive_avg_pool2d(known.weight, side).flatten(1)
        weight = (pooled * (at >= 0)).to(near)  # what is known lies on the CPU
        self.pairs.note(tokens, -(near.log() * weight).sum(1) / weight.sum(1))
