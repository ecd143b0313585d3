"""Custom Diffusion (Kumari et al., 2023) of one picture."""

import re
from dataclasses import dataclass

from torch import Tensor

from kvinv_pl.algorithm.learning_a_word import LearningAWord
from kvinv_pl.algorithm.method import Model
from kvinv_pl.errors import UserError


@dataclass(frozen=True)
class CustomDiffusion(LearningAWord):
    """Custom Diffusion (Kumari et al., 2023, Section 3.2) of the one picture: how words are read is learned.

    W^k and W^v of every cross-attention, and the vector of a rare word V* that both prompts then have before
    the subject's, "a V* cat", minimise the denoising loss of the picture under the source prompt; all else is
    as it was. Source and target are then sampled from the same noise. Regularisation by other pictures of the
    class, and the picture in other sizes, are left out: there are no other pictures, and an edit keeps its
    place. Where the source prompt is empty, the picture is "a photo of V*" and the subject's word. Timesteps
    are drawn among those of sampling.

    Args:
        token: The rare word that V* begins as.
        rate: Adam's learning rate: 1e-5 times the batch size.
        guidance: Guidance scale of the target, if the edit has none of its own; published: 6.
    """

    token: str = "ktn"
    steps: int = 250
    rate: float = 8e-5
    batch: int = 8
    guidance: float = 6.0

    def learned(self, word: str) -> str:
        """V*."""
        return self.token

    def weights(self, model: Model) -> dict[str, Tensor]:
        """W^k and W^v of the cross-attentions."""
        wanted = {f"{path}.{name}.weight" for path in model.cross_attentions for name in ("to_k", "to_v")}
        return {path: each.float().clone() for path, each in model.weights.items() if path in wanted}

    def worded(self, prompt: str, word: str) -> str:
        """The prompt with V* before the first occurrence of the word."""
        found = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", f"{self.token} {word}", prompt, count=1)
        if found == prompt:
            raise UserError(f"word: {word!r} is not in the prompt {prompt!r}: expected one of its words")
        return found
