"""Pix2pix-zero (Parmar et al., 2023): an edit direction, and guidance by cross-attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

import torch
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.method import Attending, Control, Inverted, Scene
from kvinv_pl.errors import UserError


@dataclass(frozen=True)
class Pix2PixZero:
    """Pix2pix-zero (Parmar et al., 2023, Algorithm 1): the target's latents are led by the source's maps.

    The target reads c + Delta c: the source prompt's embedding and the mean difference of sentences about the
    source and about the target (Section 3.2). Before each step x_t <- x_t - lambda grad |M_t - M_t^ref|^2,
    where M are the cross-attention maps of the target and of the source (Eqs. 2 and 3): the squares are added
    up over pixels and tokens, and averaged over the heads of both branches, the measure of the authors' code,
    to which its lambda belongs. As in the paper one x_t is moved, by the conditional branch; that code moves
    a copy of it for each branch and goes on with the unconditional one.

    Args:
        amount: lambda, as published.
        sentences: Any number about the source and any number about the target; default: the two prompts
            themselves, so that the target reads its own.
        empty_source: Whether the source is inverted and sampled without its prompt.
        guidance: Guidance scale of the target, unless another is given; as published.
    """

    amount: float = 0.1
    sentences: tuple[Sequence[str], Sequence[str]] | None = None
    empty_source: bool = False
    guidance: float | None = 5.0
    properties = ("keeps equal prompts",)
    idle = {"amount": 0.0}  # noqa: RUF012

    def __post_init__(self) -> None:
        """Refuse sentences about one of the two alone."""
        if self.sentences is not None and not (len(self.sentences) == 2 and all(self.sentences)):
            raise UserError("sentences: expected some about the source and some about the target")

    def control(self, scene: Scene, inverted: Inverted) -> Control:
        """Guide the target's latents by all cross-attentions."""
        edited = scene.contexts[2]
        if self.sentences is not None:
            before, after = (scene.model.embed(list(about)).mean(0) for about in self.sentences)
            length = lcm(len(edited), len(before), len(after))  # they may be of several chunks
            source, before, after = (repeated(each, length) for each in (scene.contexts[1], before, after))
            edited = source + after - before
        return CrossAttentionGuidance(scene, inverted, self.amount, edited)


class CrossAttentionGuidance(Control):
    """One step of gradient descent on x_t before each step of sampling."""

    def __init__(self, scene: Scene, inverted: Inverted, amount: float, edited: Float[Tensor, "L d"]) -> None:
        """`edited` is what the target reads."""
        self.scene, self.inverted, self.amount, self.edited = scene, inverted, amount, edited
        self.losses: list[float] = []
        """Of each step, before it was made."""

    def contexts(self, i: int, given: Float[Tensor, "branches 2 L d"]) -> Float[Tensor, "branches 2 M d"]:
        """For the target, c + Delta c; the others as long as that, where sentences are the longer ones."""
        given = repeated(given, len(self.edited)).clone()
        given[-1, 1] = self.edited
        return given

    def before(self, i: int, z: Float[Tensor, "2 c h w"]) -> Float[Tensor, "2 c h w"]:
        """Bring the target's maps closer to the source's."""
        if self.amount == 0:
            return z
        t = self.scene.table.timesteps[i : i + 1].to(z.device)
        contexts = self.contexts(i, self.inverted.contexts(i))[-1:]
        seen = RecordedAttention(self.scene.model.cross_attentions)
        with torch.enable_grad(), self.scene.model.controlled(i, seen):
            x = z[1:].detach().clone().requires_grad_(True)
            self.scene.model.predict(self.inverted.seen(i, torch.cat([z[:1], x])), t, contexts)
            apart = [(target - source.detach()).square().sum((1, 2)) for source, target in seen.maps]
            # the unconditional branch has as many heads again
            loss = torch.stack([heads.mean() / 2 for heads in apart]).sum()
            (gradient,) = torch.autograd.grad(loss, [x])
        self.losses.append(float(loss.detach()))
        return torch.cat([z[:1], z[1:] - self.amount * gradient.to(z)])


def repeated(reading: Float[Tensor, "*rows L d"], length: int) -> Float[Tensor, "*rows M d"]:
    """A prompt's embedding as often as makes it so long, from which attention reads the same."""
    return torch.cat([reading] * (length // reading.shape[-2]), -2)


class RecordedAttention(Control):
    """Keeps the cross-attention maps of one forward."""

    def __init__(self, attentions: Sequence[str]) -> None:
        """Watch these."""
        self.attentions = tuple(attentions)
        self.maps: list[Float[Tensor, "2 heads tokens keys"]] = []

    def attend(self, i: int, at: Attending) -> Float[Tensor, "branches 2 tokens dim"]:
        """M of source and target."""
        found = at.probabilities(at.q, at.k)
        self.maps.append(found[-1])
        return at.read(found, at.v)
