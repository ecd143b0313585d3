"""Custom Diffusion (Kumari et al., 2023) of one picture."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvinv_pl.algorithm.learning import learn, subject
from kvinv_pl.algorithm.method import Inverted, Scene
from kvinv_pl.errors import UserError


@dataclass(frozen=True)
class CustomDiffusion:
    """Custom Diffusion (Kumari et al., 2023, Section 3.2) of the one picture: how words are read is learned.

    W^k and W^v of every cross-attention, and the vector of a rare word V* that both prompts then have before
    the subject's, "a V* cat", minimise the denoising loss of the picture under the source prompt; all else is
    as it was. Source and target are then sampled from the same noise. Regularisation by other pictures of the
    class, and the picture in other sizes, are left out: there are no other pictures, and an edit keeps its
    place. Where the source prompt is empty, the picture is "a photo of V*" and the subject's word. Timesteps
    are drawn among those of sampling.

    Args:
        word: The subject's; left out, the last that both prompts have before they differ.
        token: The rare word that V* begins as.
        steps: Of Adam.
        rate: Adam's: 1e-5 times the batch.
        batch: How many timesteps and draws of noise a step looks at.
        seed: Of the noise, in learning and in sampling.
        guidance: Of the target, where the edit has none of its own; published: 6.
    """

    word: str = ""
    token: str = "ktn"
    steps: int = 250
    rate: float = 8e-5
    batch: int = 8
    seed: int = 0
    guidance: float = 6.0
    brief = {"steps": 2, "batch": 1, "word": "cat"}  # noqa: RUF012

    def __post_init__(self) -> None:
        """Refuse to learn nothing."""
        if (fewest := min(self.steps, self.batch)) < 1:
            raise UserError(f"steps, batch: expected 1 or more, got {fewest}")

    def invert(self, scene: Scene) -> Inverted:
        """Learn, and begin at noise."""
        word, model = subject(scene, self.word), scene.model
        model.positions(scene.target, word)  # a word that is not there is refused
        worded = replace(
            scene, target=self._with_token(scene.target, word),
            source=self._with_token(scene.source, word) if scene.source else "",
        )  # fmt: skip
        prompt = worded.source or f"a photo of {self.token} {word}"
        wanted = {f"{path}.{name}.weight" for path in model.cross_attentions for name in ("to_k", "to_v")}
        weights = {path: each.float().clone() for path, each in model.weights.items() if path in wanted}
        found = model.vectors(self.token)

        def given() -> tuple[Tensor, dict[str, Tensor]]:
            return model.embed_with([prompt], {self.token: found}), weights

        every = [found, *weights.values()]
        losses = learn(scene, every, given, self.steps, self.rate, self.seed, self.batch)
        with torch.no_grad():
            read = model.embed_with(["", worded.source, worded.target], {self.token: found})[1:]
        start = torch.randn(scene.z_0.shape, generator=torch.Generator().manual_seed(self.seed)).to(scene.z_0)
        return Customised(worded, start, weights=weights, read=read.to(worded.contexts), losses=losses)

    def _with_token(self, prompt: str, word: str) -> str:
        """The prompt with V* before the first occurrence of the word."""
        found = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", f"{self.token} {word}", prompt, count=1)
        if found == prompt:
            raise UserError(f"word: {word!r} is not in the prompt {prompt!r}: expected one of its words")
        return found


@dataclass(eq=False)
class Customised(Inverted):
    """DDIM's steps with the learned word and the learned projections."""

    losses: list[float] = field(default_factory=list, repr=False)
    """Of the steps."""
