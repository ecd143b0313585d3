"""Prompt-to-prompt (Hertz et al., 2023): replace, refine, reweight, and local blend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.method import Attending, Control, Inverted, Model, Scene, naming_grid, require_shares
from kvinv_pl.errors import UserError


@dataclass(frozen=True)
class PromptToPrompt:
    """Cross-attention control (Hertz et al., 2023, Algorithm 1): the source's attention maps for the target.

    Word swap (Eq. for replacement) takes the source's map M_t in place of M*_t in the first steps; adding a
    phrase (refinement) does so for the tokens that both prompts have, by their alignment; re-weighting scales
    the map of a word by c, in all steps. Self-attention maps of up to half the latent's side are the
    source's, too, in the first steps. Local blend keeps the source outside what either prompt's word attends
    to, by the maps of 16 x 16 in Stable Diffusion, and in another U-Net of the coarsest grid that several
    layers have.

    The conditional branch is controlled, as in the authors' code. Where the unconditional one reads the
    source prompt (negative-prompt inversion), it is controlled as well, which that code leaves out: guidance
    would multiply what the maps alone change as if the words had changed it, and colours would run away.

    Args:
        kind: replace or refine; auto replaces where both prompts have as many words.
        cross: The share of the steps, from noise, with the source's cross-attention; .8, as published.
        self_attention: The same for self-attention; .4 in the paper's code, .6 on PIE-Bench with cross .4.
        words: The edited word of source and of target, for local blend and re-weighting; None: neither.
        weight: c, the weight of the target's word.
        threshold: Threshold of local blend, in maps whose maximum is 1.
        blend_start: The share of the steps after which local blend begins.
        guidance: Guidance scale of the target, unless another is given; as published.
        empty_source: Whether the source is inverted and sampled without its prompt.
        negative: Whether an unconditional branch that reads the source prompt is controlled.
    """

    kind: Literal["auto", "replace", "refine"] = "auto"
    cross: float = 0.8
    self_attention: float = 0.4
    words: tuple[str, str] | None = None
    weight: float = 1.0
    threshold: float = 0.3
    blend_start: float = 0.2
    guidance: float | None = 7.5
    empty_source: bool = False
    negative: bool = True
    properties = ("keeps equal prompts",)
    idle = {"cross": 0.0, "self_attention": 0.0}  # noqa: RUF012

    def __post_init__(self) -> None:
        """Refuse a weight of no word, and what is no share."""
        require_shares(cross=self.cross, self_attention=self.self_attention, blend_start=self.blend_start)
        if self.kind not in ("auto", "replace", "refine"):
            raise UserError(f"kind: expected auto, replace or refine, got {self.kind!r}")
        if self.weight != 1 and self.words is None:
            raise UserError(f"weight: expected 1 without words, got {self.weight}")

    def control(self, scene: Scene, inverted: Inverted) -> Control:
        """Take over all attentions."""
        prompts = (scene.source, scene.target)
        source, target = (Tokens.of(scene.model, prompt) for prompt in prompts)
        replaced = self.kind == "replace" or (self.kind == "auto" and source.words == target.words)
        tokens, keeps_own = replacement(source, target) if replaced else refinement(source, target)
        weights, positions = torch.ones(target.length), None
        if self.words is not None:
            positions = [scene.model.positions(*pair) for pair in zip(prompts, self.words, strict=True)]
            weights[positions[1]] = self.weight
        # of two prompts of several chunks, each is repeated until both are of one length
        rows, columns = (scene.contexts.shape[1] // prompt.length for prompt in (source, target))
        found = tokens.repeat(rows, columns) / columns, keeps_own.repeat(columns), weights.repeat(columns)
        *mixing, weights = (part.to(scene.z_0.device) for part in found)
        both = self.negative and inverted.negative is not None
        return EditedMaps(self, scene, mixing, weights, positions, both)


class EditedMaps(Control):
    """The source's attention maps, mapped to the target's tokens."""

    def __init__(
        self,
        chosen: PromptToPrompt,
        scene: Scene,
        mixing: Sequence[Tensor],
        weights: Float[Tensor, " tokens"],
        positions: list[list[int]] | None,
        both: bool,
    ) -> None:
        """Count the steps; `positions` are those of the words of local blend, `both` means the branches."""
        self.attentions = (*scene.model.self_attentions, *scene.model.cross_attentions)
        self.steps, self.chosen, self.side = len(scene.table), chosen, scene.z_0.shape[-1]
        self.tokens, self.keeps_own = mixing
        self.weights, self.positions = weights, positions
        self.branches = slice(None) if both else slice(-1, None)
        self._seen: dict[tuple[int, int], Tensor] = {}
        self._layers: dict[tuple[int, int], set[str]] = {}

    def attend(self, i: int, at: Attending) -> Float[Tensor, "branches 2 tokens dim"]:
        """Cross-attention: M_t mapped, or M*_t, times c; self-attention: the source's Q and K."""
        return self._cross(i, at) if at.cross else self._self(i, at)

    def _self(self, i: int, at: Attending) -> Tensor:
        q, k = at.q, at.k
        if i < self.chosen.self_attention * self.steps and at.grid[1] <= self.side // 2:
            q, k = q.clone(), k.clone()
            q[self.branches, 1], k[self.branches, 1] = q[self.branches, 0], k[self.branches, 0]
        return at.attend(q, k, at.v)

    def _cross(self, i: int, at: Attending) -> Tensor:
        attention = at.probabilities(at.q, at.k).clone()
        source, target = attention[-1]
        if i < self.chosen.cross * self.steps:
            target = source @ self.tokens + target * self.keeps_own
            attention[self.branches, 1] = attention[self.branches, 0]  # where both prompts are one
        attention[-1, 1] = target * self.weights
        if self.positions is not None:
            words = enumerate(self.positions)
            maps = [attention[-1, row].mean(0)[:, places].sum(-1) for row, places in words]
            found = torch.stack(maps).view(2, *at.grid)
            self._seen[at.grid] = found + self._seen.get(at.grid, 0)
            self._layers.setdefault(at.grid, set()).add(at.path)
        return at.read(attention, at.v)

    def after(self, i: int, z: Float[Tensor, "2 c h w"]) -> Float[Tensor, "2 c h w"]:
        """Local blend: outside the words of both, z-bar is the source's."""
        if not self._seen or i < self.chosen.blend_start * self.steps:
            return z
        grid = naming_grid({grid: len(paths) for grid, paths in self._layers.items()})
        spread = F.max_pool2d(self._seen[grid][:, None], 3, 1, 1)
        fitted = F.interpolate(spread, z.shape[-2:], mode="nearest")
        either = (fitted / fitted.amax((2, 3), keepdim=True) > self.chosen.threshold).any(0)
        return torch.cat([z[:1], torch.where(either, z[1:], z[:1])])


@dataclass(frozen=True)
class Tokens:
    """A prompt's tokens, their places by the chunks that they are read in, and all places there are."""

    names: Sequence[str]
    places: Sequence[range]
    length: int

    @classmethod
    def of(cls, model: Model, prompt: str) -> "Tokens":
        """As the model reads the prompt alone."""
        length = model.embed([prompt]).shape[1]
        return cls(model.tokens(prompt), model.places(prompt), length)

    @property
    def words(self) -> int:
        """How many there are."""
        return sum(name.endswith("</w>") for name in self.names)

    @property
    def groups(self) -> list[list[int]]:
        """The places of each word's tokens."""
        groups: list[list[int]] = [[]]
        for name, place in zip(self.names, self.flat, strict=True):
            groups[-1].append(place)
            if name.endswith("</w>"):
                groups.append([])
        return [group for group in groups if group]

    @property
    def flat(self) -> list[int]:
        """The place of each token."""
        return [place for chunk in self.places for place in chunk]

    @property
    def ends(self) -> list[range]:
        """What follows the tokens of each chunk: its end, and the padding behind it."""
        size = self.length // len(self.places)
        return [range(chunk.stop, (n + 1) * size) for n, chunk in enumerate(self.places)]


def replacement(source: Tokens, target: Tokens) -> tuple[Tensor, Tensor]:
    """Word by word, from the source's tokens to the target's; and which of those keep their own map.

    The attention to a word of m tokens is shared out among the n tokens of the word in its place.
    """
    old, new = source.groups, target.groups
    if len(old) != len(new):
        raise UserError(
            f"kind: expected refine, got replace: the source has {len(old)} words, the target {len(new)}"
        )
    mapping, keeps_own = _around_words(source, target, to_the_end=True)
    for rows, columns in zip(old, new, strict=True):
        if len(rows) == len(columns):
            mapping[rows, columns] = 1
        else:
            mapping[torch.tensor(rows)[:, None], torch.tensor(columns)] = 1 / len(columns)
        keeps_own[columns] = 0
    return mapping, keeps_own


def refinement(source: Tokens, target: Tokens) -> tuple[Tensor, Tensor]:
    """By the alignment A of the tokens: the source's map of A(j) where there is one, or the target's."""
    mapping, keeps_own = _around_words(source, target, to_the_end=False)
    for a, b in aligned(source.names, target.names):
        rows, columns = source.flat[a], target.flat[b]
        mapping[rows, columns], keeps_own[columns] = 1, 0
    return mapping, keeps_own


def _around_words(source: Tokens, target: Tokens, to_the_end: bool) -> tuple[Tensor, Tensor]:
    """The mapping of what is around the words, chunk by chunk: starts, ends and padding.

    The last chunk of a prompt of fewer chunks stands for all that the other has more, so that no attention is
    lost: that to the start is most of it, and is alike in every chunk.
    """
    mapping, keeps_own = torch.zeros(source.length, target.length), torch.ones(target.length)
    s, t = len(source.places), len(target.places)
    pairs = [(min(n, s - 1), min(n, t - 1)) for n in range(max(s, t))]
    for a, b in pairs:
        share = 1 / [rows for rows, _ in pairs].count(a)
        rows, columns = source.ends[a], target.ends[b]
        reach = len(columns) if to_the_end else min(len(rows), len(columns))
        ends = ((rows[min(n, len(rows) - 1)], columns[n]) for n in range(reach))
        for old, new in ((source.places[a].start - 1, target.places[b].start - 1), *ends):
            mapping[old, new] += share
            keeps_own[new] = 0
    return mapping, keeps_own


def aligned(source: Sequence[str], target: Sequence[str]) -> list[tuple[int, int]]:
    """Needleman and Wunsch (1970) with 1 for a match, -1 for a mismatch and 0 for a gap: pairs that match."""
    best = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for a, old in enumerate(source):
        for b, new in enumerate(target):
            paired = best[a][b] + (1 if old == new else -1)
            best[a + 1][b + 1] = max(paired, best[a][b + 1], best[a + 1][b])
    pairs: list[tuple[int, int]] = []
    a, b = len(source), len(target)
    while a and b:
        if source[a - 1] == target[b - 1] and best[a][b] == best[a - 1][b - 1] + 1:
            a, b = a - 1, b - 1
            pairs.append((a, b))
        elif best[a][b] == best[a - 1][b]:
            a -= 1
        elif best[a][b] == best[a][b - 1]:
            b -= 1
        else:
            a, b = a - 1, b - 1
    return pairs[::-1]
