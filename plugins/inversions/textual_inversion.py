"""Textual Inversion (Gal et al., 2023) of one picture."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvinv_pl.algorithm.learning import learn, subject
from kvinv_pl.algorithm.method import Inverted, Scene
from kvinv_pl.errors import UserError


@dataclass(frozen=True)
class TextualInversion:
    """Textual Inversion (Gal et al., 2023, Eq. 2) of the one picture: a word for its subject is learned.

    v*, the vector of the pseudo-word S*, minimises the denoising loss of the picture under the source prompt
    with S* for the subject's word, beginning with that word's own vector; the network and all other words are
    as they were. Both prompts are then read with it, and sampled from the same noise. A word of several
    tokens has as many vectors. Where the source prompt is empty, the picture is "a photo of S*". Timesteps
    are drawn among those of sampling. Steps, rate and batch are those of the example in diffusers.

    Args:
        word: The subject's; left out, the last that both prompts have before they differ.
        steps: Of Adam.
        rate: Adam's: 5e-4 times the batch.
        batch: How many timesteps and draws of noise a step looks at.
        seed: Of the noise, in learning and in sampling.
        guidance: Of the target, where the edit has none of its own.
    """

    word: str = ""
    steps: int = 3000
    rate: float = 2e-3
    batch: int = 4
    seed: int = 0
    guidance: float = 7.5
    brief = {"steps": 2, "batch": 1, "word": "cat"}  # noqa: RUF012

    def __post_init__(self) -> None:
        """Refuse to learn nothing."""
        if (fewest := min(self.steps, self.batch)) < 1:
            raise UserError(f"steps, batch: expected 1 or more, got {fewest}")

    def invert(self, scene: Scene) -> Inverted:
        """Learn, and begin at noise."""
        word, model = subject(scene, self.word), scene.model
        model.positions(scene.target, word)  # a word that is not there is refused
        prompt = scene.source or f"a photo of {word}"
        model.positions(prompt, word)
        found = model.vectors(word)
        losses = learn(
            scene, [found], lambda: (model.embed_with([prompt], {word: found}), {}),
            self.steps, self.rate, self.seed, self.batch,
        )  # fmt: skip
        with torch.no_grad():
            read = model.embed_with(["", scene.source, scene.target], {word: found})[1:]
        start = torch.randn(scene.z_0.shape, generator=torch.Generator().manual_seed(self.seed)).to(scene.z_0)
        return Worded(scene, start, read=read.to(scene.contexts), losses=losses)


@dataclass(eq=False)
class Worded(Inverted):
    """DDIM's steps with the learned word."""

    losses: list[float] = field(default_factory=list, repr=False)
    """Of the steps."""
