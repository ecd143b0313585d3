"""FastComposer (Xiao et al., 2023), among the methods."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kvinv_pl.algorithm.learning_a_word import subject
from kvinv_pl.algorithm.method import Control, Inverted, require_shares, sample
from kvinv_pl.api import KVInverter
from kvinv_pl.bench.methods import loading
from kvinv_pl.bench.running import Encoded, load_picture
from kvinv_pl.models.controllable import swapped_parameters
from kvinv_pl.models.published.fastcomposer import FastComposer

_loaded = lru_cache(maxsize=1)(FastComposer.load)  # of the row that is computed


@dataclass(eq=False)
class DelayedConditioning(Inverted):
    """DDIM's steps, the first of which read the prompts alone (delayed subject conditioning)."""

    until: int = 0

    def contexts(self, i: int) -> Float[Tensor, "branches 2 L d"]:
        """What is read at step i."""
        given = super().contexts(i)
        return given if i >= self.until else Inverted(self.scene, self.start).contexts(i)


@dataclass(frozen=True)
class FastComposerEdit:
    """FastComposer (Xiao et al., 2023): the subject's word is read with the picture, by weights of its own.

    A network that was trained on pictures of people joins the embedding of the word and that of the picture;
    the first steps read the prompt alone (delayed subject conditioning). It begins at noise, so that of the
    picture the subject alone is kept. The model is Stable Diffusion 1.5, which it takes the place of; steps
    are DDIM's. There is no reconstruction.

    Args:
        weights: Its authors' pytorch_model.bin, as a file or a hub id, which is downloaded (4.5 GB).
        word: The subject's word; default: the last that both prompts have before they differ.
        delay: Share of the steps that read only the prompt; published: the first 10 of 50.
        guidance: Guidance scale of the prompt; published: 5.
        seed: Seed of the noise.
    """

    weights: str = "mit-han-lab/fastcomposer/pytorch_model.bin"
    word: str = ""
    delay: float = 0.2
    guidance: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        require_shares(delay=self.delay)

    def prepare(self, model: KVInverter) -> None:
        """Load, or fetch, its weights."""
        self._load(Encoded.network(model).device)

    @torch.no_grad()
    def render(
        self,
        model: KVInverter,
        picture: Image.Image | str | Path,
        source: str,
        target: str,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Image.Image:
        """A picture of the target prompt with the subject, in the size that the picture came in."""
        encoded = Encoded.encode(model, picture)
        scene = encoded.scene(source, target, self.guidance if guidance is None else guidance, steps)
        place = scene.model.positions(target, subject(scene, self.word))[-1]
        loaded = self._load(encoded.denoiser.device)
        network = loaded.weights("unet", scene.model.weights)
        text = encoded.denoiser.backbone.prompts.text_encoder
        with swapped_parameters(text, loaded.weights("text_encoder", dict(text.named_parameters()))):
            # both rows are of the target: one of them is shown
            scene = replace(scene, source=target)
            read = scene.contexts[1:].clone()
        read[:, place] = loaded.join(read[0, place], load_picture(picture))
        start = torch.randn(scene.z_0.shape, generator=torch.Generator().manual_seed(self.seed))
        until = round(self.delay * len(scene.table))
        inverted = DelayedConditioning(scene, start.to(scene.z_0), weights=network, read=read, until=until)
        return encoded.decode(sample(scene, inverted, Control())[1:])

    def _load(self, device: torch.device) -> FastComposer:
        with loading("fastcomposer", "weights"):
            return _loaded(self.weights, device)
