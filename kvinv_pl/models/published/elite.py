"""ELITE (Wei et al., 2023): its published mapping networks, which turn a picture into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.hub import resolve_file
from kvinv_pl.models.checkpoints.single_file import read_tensors
from kvinv_pl.models.vision.clip_encoder import filled, normalized, vision_encoder

GLOBAL, LOCAL = "ELITE's global_mapper.pt", "ELITE's local_mapper.pt"
VISION = "CLIP ViT-L/14 (openai/clip-vit-large-patch14/model.safetensors)"
LEVELS = 5  # the last hidden state of CLIP, and those after four of its layers
PUBLISHED_SIDE = 128  # pixels a side that masks are brought to before they are as coarse as the patches
MAPPING = "mapping_"  # what begins the names of the mapping's own layers; the others are keys and values


def _layers(before: int, hidden: int, after: int) -> nn.Sequential:
    def stage(wide: int) -> list[nn.Module]:
        return [nn.Linear(wide, hidden), nn.LayerNorm(hidden), nn.LeakyReLU()]

    return nn.Sequential(*stage(before), *stage(hidden), nn.Linear(hidden, after))


class _Mapping(nn.Module):
    """From CLIP's hidden states to words' vectors: of each level and patch one, with its class token's."""

    def __init__(self, before: int, hidden: int, after: int) -> None:
        super().__init__()
        for level in range(LEVELS):
            for name in (f"{MAPPING}{level}", f"{MAPPING}patch_{level}"):
                self.add_module(name, _layers(before, hidden, after))

    def forward(self, levels: Sequence[Float[Tensor, "tokens d"]]) -> Float[Tensor, "levels patches e"]:
        of_class, of_patches = (
            [self.get_submodule(f"{MAPPING}{which}{n}") for n in range(LEVELS)] for which in ("", "patch_")
        )
        each = zip(of_class, of_patches, levels, strict=True)
        return torch.stack([of(x[:1]) + of_patch(x[1:]) for of, of_patch, x in each])


class Elite:
    """The two mapping networks, and the encoder whose hidden states they take.

    Of the global one, w_0 alone stands in the prompt, as in its authors' sampling: the others are there for
    what is not to be kept.
    """

    def __init__(self, names: Mapping[str, str], files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """From the names and the tensors of the files: "global", "local" and "clip"."""
        self.names, self.files = names, files
        self._global = self._mapping("global", GLOBAL)
        self._local = self._mapping("local", LOCAL)
        self.encoder = vision_encoder(files["clip"], names["clip"], VISION)

    @classmethod
    def load(cls, global_mapper: str, local_mapper: str, clip: str, device: torch.device) -> Elite:
        """Load three files, or fetch them from the hub (owner/name/FILE).

        Of a pickle, tensors alone are read.
        """
        names = {"global": global_mapper, "local": local_mapper, "clip": clip}
        needed = {"global": GLOBAL, "local": LOCAL, "clip": VISION}
        found = cls(names, {key: read_tensors(resolve_file(names[key], needed[key])) for key in names})
        for net in (found._global, found._local, found.encoder):
            net.to(device)
        return found

    def network_weights(self, weights: Mapping[str, Tensor], paths: Sequence[str]) -> dict[str, Tensor]:
        """W^K and W^V of the global network for these cross-attentions, by the names of the U-Net's own."""
        return self._projections("global", GLOBAL, weights, paths)

    def local_weights(self, weights: Mapping[str, Tensor], paths: Sequence[str]) -> dict[str, Tensor]:
        """The same of the local network."""
        return self._projections("local", LOCAL, weights, paths)

    @torch.no_grad()
    def word(self, picture: Image.Image) -> Float[Tensor, "1 e"]:
        """w_0, the vector of the word that stands for what the picture shows."""
        return self._global(self._levels(picture))[0].mean(0, keepdim=True)

    @torch.no_grad()
    def local(self, picture: Image.Image, mask: Image.Image) -> Float[Tensor, "patches e"]:
        """What the patches of the object say: those outside the mask say nothing."""
        white = mask.convert("L").point([0] + [255] * 255)
        shown = Image.composite(picture.convert("RGB"), Image.new("RGB", picture.size), white)
        found = self._local(self._levels(shown)).mean(0)
        inside = torch.from_numpy(np.array(white) / 255).float()[None, None]
        for side in (PUBLISHED_SIDE, round(len(found) ** 0.5)):
            inside = F.interpolate(inside, (side, side), mode="nearest")
        return found * inside.flatten()[:, None].to(found)

    def _levels(self, picture: Image.Image) -> list[Float[Tensor, "tokens d"]]:
        """CLIP's last hidden state, and those after a sixth, a third, half and two thirds of its layers."""
        side = int(self.encoder.config.image_size)
        square = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        out = self.encoder(normalized(square, self.encoder.device), output_hidden_states=True)
        depth = len(out.hidden_states) - 1
        among = [out.hidden_states[depth * share // 6][0] for share in range(1, LEVELS)]
        return [out.last_hidden_state[0], *among]

    def _mapping(self, which: str, needed: str) -> _Mapping:
        tensors = {name: x for name, x in self.files[which].items() if name.startswith(MAPPING)}
        first, last = (tensors.get(f"{MAPPING}0.{layer}.weight") for layer in (0, 6))
        if first is None or last is None:
            raise UserError(f"{self.names[which]} has no weights {MAPPING}0.*; expected {needed}, give that")
        net = _Mapping(first.shape[1], first.shape[0], last.shape[0])
        return filled(net, tensors, self.names[which], needed)

    def _projections(
        self, which: str, needed: str, weights: Mapping[str, Tensor], paths: Sequence[str]
    ) -> dict[str, Tensor]:
        """What a file has for to_k and to_v of each path, whose dots are underscores there."""
        own = {
            f"{path.replace('.', '_')}_{name}.weight": f"{path}.{name}.weight"
            for path in paths
            for name in ("to_k", "to_v")
        }
        file = {name: x for name, x in self.files[which].items() if not name.startswith(MAPPING)}
        if {name: x.shape for name, x in file.items()} != {name: weights[own[name]].shape for name in own}:
            raise UserError(
                f"{self.names[which]} fits another U-Net than this model has: {needed} is for Stable "
                "Diffusion 1.4; load that, or one that was fine-tuned from it"
            )
        return {own[name]: x for name, x in file.items()}
