"""A loaded checkpoint as methods see it."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from kvinv_pl.models.controllable import ControllableUNet
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.models.prompts import word_positions
from kvinv_pl.models.text.word_vectors import embed_with_vectors, vectors_of_word


class Network(ControllableUNet):
    """The `Model` of `kvinv_pl.algorithm.method`, for latents of one size."""

    def __init__(self, denoiser: Denoiser, grid: tuple[int, int]) -> None:
        super().__init__(denoiser.backbone.unet, grid)
        self.denoiser, self.backbone = denoiser, denoiser.backbone

    def embed(self, prompts: list[str]) -> Float[Tensor, "n L d"]:
        """The prompts as the U-Net reads them."""
        return self.backbone.embed(prompts)

    def vectors(self, word: str) -> Float[Tensor, "tokens e"]:
        """The text model's own, of a word's tokens."""
        return vectors_of_word(self.backbone.prompts, word)

    def embed_with(
        self, prompts: list[str], words: Mapping[str, Float[Tensor, "_ e"]]
    ) -> Float[Tensor, "n L d"]:
        """The prompts with these vectors for these words."""
        return embed_with_vectors(self.backbone.prompts, prompts, words)

    def tokens(self, prompt: str) -> list[str]:
        """The prompt's tokens, without those of its start and its end, as far as they are read."""
        return [token.name for chunk in self.backbone.prompts.chunks(prompt) for token in chunk]

    def places(self, prompt: str) -> list[range]:
        """Where these tokens stand, by the chunks that the prompt is read in."""
        return self.backbone.prompts.places(prompt)

    def positions(self, prompt: str, word: str) -> list[int]:
        """The places of a word's tokens in a prompt."""
        return word_positions(self.backbone, prompt, word)

    def predict(
        self, z: Float[Tensor, "rows c h w"], t: Tensor, contexts: Float[Tensor, "branches rows L d"]
    ) -> Float[Tensor, "branches rows c h w"]:
        """All branches in one forward."""
        return self.denoiser.branches(z, t.expand(len(z)), contexts.expand(-1, len(z), -1, -1))
