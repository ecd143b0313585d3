"""Methods that learn the vectors of a word by one picture, and the word that is its subject."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvinv_pl.algorithm.learning import Learning, Taught, learn
from kvinv_pl.algorithm.method import Model, Scene
from kvinv_pl.algorithm.words import common_subject


@dataclass(frozen=True, kw_only=True)
class LearningAWord(Learning):
    """One that learns the vectors of a word, and perhaps weights, by the picture under its prompt.

    Both prompts are then read with them. Where the source prompt is empty, the picture is "a photo of" the
    subject. Timesteps are drawn among those of sampling.

    Args:
        word: The subject's; left out, the last that both prompts have before they differ.
        steps: Of Adam.
        rate: Adam's.
        batch: How many timesteps and draws of noise a step looks at.
        micro_batch: How many of them go through the network at once: more is faster and takes more memory.
    """

    word: str = ""
    steps: int
    rate: float
    batch: int
    micro_batch: int = 1
    counts = ("steps", "batch", "micro_batch")
    brief = {"steps": 2, "batch": 1, "word": "cat"}  # noqa: RUF012

    def worded(self, prompt: str, word: str) -> str:
        """A prompt as it is read, given the subject's word; as it is."""
        return prompt

    def learned(self, word: str) -> str:
        """The word whose vectors are learned; the subject's."""
        return word

    def weights(self, model: Model) -> dict[str, Tensor]:
        """The network's weights that are learned as well, in fp32, by their paths; none."""
        return {}

    def invert(self, scene: Scene) -> Taught:
        """Learn, and begin at noise."""
        word, model = subject(scene, self.word), scene.model
        alone = scene.source or f"a photo of {word}"
        for prompt in (scene.target, alone):
            model.positions(prompt, word)  # a word that is not there is refused
        source = self.worded(scene.source, word) if scene.source else ""
        scene = replace(scene, source=source, target=self.worded(scene.target, word))
        prompts, learned = [self.worded(alone, word)], self.learned(word)
        vectors, weights = model.vectors(learned), self.weights(model)

        def given() -> tuple[Tensor, dict[str, Tensor]]:
            return model.embed_with(prompts, {learned: vectors}), weights

        every = [vectors, *weights.values()]
        sizes = self.batch, self.micro_batch
        losses = learn(scene, every, given, self.steps, self.rate, self.seed, *sizes)
        with torch.no_grad():
            read = model.embed_with(["", scene.source, scene.target], {learned: vectors})[1:]
        return Taught(scene, self.noise(scene), weights=weights, read=read.to(scene.contexts), losses=losses)


def subject(scene: Scene, word: str) -> str:
    """The word for what an edit keeps: the one given, or else `common_subject`'s; a UserError without any."""
    return word or common_subject(scene.source, scene.target, "give it by the method's option word")
