"""Plug-and-play diffusion features (Tumanyan et al., 2023)."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.method import Attending, Control, Inverted, Scene, require_shares
from kvinv_pl.errors import UserError


@dataclass(frozen=True)
class PlugAndPlay:
    """Plug-and-play features (Tumanyan et al., 2023, Algorithm 1): the source's features for the target.

    In the first tau_f of the steps, the features f of one layer of the decoder are the source's, and in the
    first tau_A the self-attention A = softmax(Q K^T) of that layer and of all behind it, in both branches.
    Features are what the layer's last convolution gives, as in the authors' code. The source is sampled
    without a prompt; put back to its trajectory (`direct`) it is the authors' own, who invert with 1,000
    steps and sample with 50.

    Args:
        features: tau_f, the share of the steps with the source's features; as published.
        self_attention: tau_A, the same for self-attention; as published.
        layer: The decoder layer, in the order of the forward pass; default: 4 of Stable Diffusion's 12, and
            the same share of another U-Net's.
        empty_source: Whether the source is inverted and sampled without a prompt, as published.
        guidance: Guidance scale of the target, unless another is given; as published.
    """

    features: float = 0.8
    self_attention: float = 0.5
    layer: int | None = None
    empty_source: bool = True
    guidance: float | None = 7.5
    properties = ("keeps equal prompts",)
    idle = {"features": 0.0, "self_attention": 0.0}  # noqa: RUF012

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        require_shares(features=self.features, self_attention=self.self_attention)

    def control(self, scene: Scene, inverted: Inverted) -> Control:
        """Take over a convolution, and the self-attentions from there on."""
        every = scene.model.decoder
        layer = round(len(every) * 4 / 12) if self.layer is None else self.layer
        if not 0 <= layer < len(every):
            raise UserError(f"layer: expected 0 to {len(every) - 1}, got {layer}")
        attentions = [path for _, found in every[layer:] for path in found]
        until = (int(share * len(scene.table) + 0.5) for share in (self.features, self.self_attention))
        return InjectedFeatures(every[layer][0], attentions, *until)


class InjectedFeatures(Control):
    """The source's features, and its Q and K."""

    def __init__(self, convolution: str, attentions: Sequence[str], features: int, maps: int) -> None:
        """Take over so many steps of each."""
        self.convolutions, self.attentions = (convolution,), tuple(attentions)
        self.features, self.maps = features, maps

    def convolve(
        self, i: int, path: str, x: Float[Tensor, "branches 2 c h w"]
    ) -> Float[Tensor, "branches 2 c h w"]:
        """The source's f, of the same branch."""
        return x[:, :1].expand_as(x) if i < self.features else x

    def attend(self, i: int, at: Attending) -> Float[Tensor, "branches 2 tokens dim"]:
        """The source's A, of the same branch, and the target's own V."""
        if i >= self.maps:
            return at.attend(at.q, at.k, at.v)
        return at.attend(at.q[:, :1].expand_as(at.q), at.k[:, :1].expand_as(at.k), at.v)
