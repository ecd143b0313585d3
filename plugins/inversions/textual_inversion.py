"""Textual Inversion (Gal et al., 2023) of one picture."""

from dataclasses import dataclass

from kvinv_pl.algorithm.learning_a_word import LearningAWord


@dataclass(frozen=True)
class TextualInversion(LearningAWord):
    """Textual Inversion (Gal et al., 2023, Eq. 2) of the one picture: a word for its subject is learned.

    v*, the vector of the pseudo-word S*, minimises the denoising loss of the picture under the source prompt
    with S* for the subject's word, beginning with that word's own vector; the network and all other words are
    as they were. Both prompts are then read with it, and sampled from the same noise. A word of several
    tokens has as many vectors. Where the source prompt is empty, the picture is "a photo of S*". Timesteps
    are drawn among those of sampling. Steps, rate and batch are those of the example in diffusers.

    Args:
        rate: Adam's learning rate: 5e-4 times the batch size.
    """

    steps: int = 3000
    rate: float = 2e-3
    batch: int = 4
