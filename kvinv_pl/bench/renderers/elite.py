"""ELITE (Wei et al., 2023), among the methods."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kvinv_pl.algorithm.learning_a_word import subject
from kvinv_pl.algorithm.method import Attending, Control, Inverted, Scene, sample
from kvinv_pl.api import KVInverter
from kvinv_pl.attention.cross_attention import cross_attentions
from kvinv_pl.bench.methods import loading
from kvinv_pl.bench.running import Encoded, load_picture
from kvinv_pl.data.images.geometry import to_pixels
from kvinv_pl.data.images.masks import enlarge_mask
from kvinv_pl.errors import UserError
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.models.prompts import mask_from_word
from kvinv_pl.models.published.elite import Elite, load_encoder

# of the row that is computed
_mappers, _encoder = lru_cache(maxsize=1)(Elite.load), lru_cache(maxsize=1)(load_encoder)


class LocalReading(Control):
    """Cross-attentions read the object's patches as well, where they attend to its word."""

    def __init__(
        self,
        scene: Scene,
        weights: Mapping[str, Tensor],
        local: Float[Tensor, "patches e"],
        place: int,
        strength: float,
    ) -> None:
        self.attentions, self.place, self.strength = scene.model.cross_attentions, place, strength
        self._read = {name: F.linear(local, weight.to(local)) for name, weight in weights.items()}

    def attend(self, i: int, at: Attending) -> Float[Tensor, "branches 2 tokens dim"]:
        """Of the conditional branch: the words' output, and lambda times that of the patches."""
        k, v = (self._read[f"{at.path}.{name}.weight"].to(at.q)[None, None] for name in ("to_k", "to_v"))
        q = at.q[-1:]
        word = at.probabilities(q, at.k[-1:])[..., self.place, None]
        word = word / word.amax((2, 3, 4), keepdim=True)  # at its most 1 in a layer's heads
        out = at.attend(at.q, at.k, at.v).clone()
        out[-1:] += at.read(at.probabilities(q, k) * word * self.strength, v).to(out)
        return out


@dataclass(frozen=True)
class EliteEdit:
    """ELITE (Wei et al., 2023): mapping networks turn the picture into a word, and its object into details.

    Networks that were trained on many photographs give the vector of a word, which stands in the target for
    the subject's, and keys and values of the object's patches, which are read where the word is. It
    begins at noise, so that of the picture the subject alone is kept. The model is Stable Diffusion 1.4;
    steps are DDIM's, where its authors take 100 of LMS. There is no reconstruction.

    Args:
        global_mapper: Its authors' global_mapper.pt, as a file or on the hub, where it is downloaded.
        local_mapper: Its authors' local_mapper.pt, likewise.
        clip: The weights of CLIP ViT-L/14, likewise (1.7 GB).
        mask_given: Whether it is given a mask of the object; otherwise that is what the model's
            cross-attention to its word finds.
        word: The subject's word; default: the last that both prompts have before they differ.
        token: The word that is written in its place, whose vector is replaced.
        strength: lambda, how much of the patches is read; 0: the word alone.
        guidance: Guidance scale of the prompt; published: 5.
        seed: Seed of the noise.
    """

    global_mapper: str = "ELITE-library/ELITE/checkpoints/global_mapper.pt"
    local_mapper: str = "ELITE-library/ELITE/checkpoints/local_mapper.pt"
    clip: str = "openai/clip-vit-large-patch14/model.safetensors"
    mask_given: bool = False
    word: str = ""
    token: str = "S"
    strength: float = 0.8
    guidance: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse less than nothing."""
        if self.strength < 0:
            raise UserError(f"strength: expected 0 or more, got {self.strength}")

    def prepare(self, model: KVInverter) -> None:
        """Load, or fetch, what it needs; a UserError where the model is another one."""
        self._load(Encoded.network(model))

    @torch.no_grad()
    def render(
        self,
        model: KVInverter,
        picture: Image.Image | str | Path,
        source: str,
        target: str,
        steps: int | None = None,
        guidance: float | None = None,
        mask: Image.Image | None = None,
    ) -> Image.Image:
        """A picture of the target prompt with the subject, in the size that the picture came in."""
        image, encoded = load_picture(picture), Encoded.encode(model, picture)
        scene = encoded.scene(source, target, self.guidance if guidance is None else guidance, steps)
        word = subject(scene, self.word)
        scene.model.positions(target, word)  # a word that is not there is refused
        found = _word_mask(encoded, image, source, word) if mask is None else mask
        if found.size != image.size:
            wanted, got = ("{}x{}".format(*each.size) for each in (image, found))
            raise UserError(f"mask: expected {wanted} pixels, as the picture has, got {got}")
        if not any(found.convert("L").histogram()[128:]):
            raise UserError(
                "mask: expected white where the object is, got none: paint one, or take another word"
            )
        loaded, encoder = self._load(encoded.denoiser)
        place = rf"(?<!\w){re.escape(word)}(?!\w)"
        worded = re.sub(place, lambda _: self.token, target, count=1, flags=re.IGNORECASE)
        # both rows are of the target: one of them is shown
        scene = replace(scene, source=worded, target=worded)
        places = scene.model.positions(worded, self.token)
        if len(scene.model.vectors(self.token)) != 1:
            raise UserError(f"token: expected a word of one token, got {self.token!r}")
        read = scene.model.embed_with(["", worded, worded], {self.token: loaded.word(encoder, image)})[1:]
        paths, network = scene.model.cross_attentions, scene.model.weights
        patches = loaded.local(encoder, image, found)
        local = loaded.local_mapper.projections(network, paths)
        start = torch.randn(scene.z_0.shape, generator=torch.Generator().manual_seed(self.seed))
        inverted = Inverted(
            scene,
            start.to(scene.z_0),
            weights=loaded.global_mapper.projections(network, paths),
            read=read.to(scene.contexts),
        )
        control = LocalReading(scene, local, patches, places[0], self.strength)
        return encoded.decode(sample(scene, inverted, control)[1:])

    def _load(self, denoiser: Denoiser) -> tuple[Elite, Any]:
        """The mapping networks, which fit the U-Net, and the encoder."""
        unet, device = denoiser.backbone.unet, denoiser.device
        with loading("elite", "global_mapper", "local_mapper"):
            found = _mappers(self.global_mapper, self.local_mapper, device)
        for mapper in (found.global_mapper, found.local_mapper):
            mapper.projections(dict(unet.named_parameters()), list(cross_attentions(unet)))
        with loading("elite", "clip"):
            return found, _encoder(self.clip, device)


def _word_mask(encoded: Encoded, image: Image.Image, source: str, word: str) -> Image.Image:
    """White where the word's object is, in the picture's size."""
    if not source:
        raise UserError(
            "source: expected a prompt, by whose word the object is found, or a mask with mask_given=True"
        )
    pixels = to_pixels(image, encoded.geometry).to(encoded.denoiser.device)
    with encoded.denoiser.autocast():
        found = mask_from_word(encoded.denoiser.backbone, pixels, source, word)
    return enlarge_mask(found, encoded.geometry)
