"""The seam for methods to compare with: what an inversion leaves, what an edit controls, and their sampling.

Source and target are sampled side by side. Tensors of a forward are (branches, 2, ...): the branches are the
unconditional one, where guidance runs, and the conditional one; of the rows, 0 is the source, 1 the target.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.ddim import StepTable
from kvinv_pl.algorithm.guidance import branches_at
from kvinv_pl.algorithm.inversion import Eps, invert


@runtime_checkable
class Attending(Protocol):
    """One attention layer in one forward."""

    @property
    def path(self) -> str:
        """The layer's module path."""
        ...

    @property
    def cross(self) -> bool:
        """Whether the keys are a prompt's tokens."""
        ...

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the map whose pixels are the queries."""
        ...

    @property
    def q(self) -> Float[Tensor, "branches 2 tokens dim"]:
        """Queries, the heads side by side in dim."""
        ...

    @property
    def k(self) -> Float[Tensor, "branches 2 keys dim"]:
        """Keys."""
        ...

    @property
    def v(self) -> Float[Tensor, "branches 2 keys dim"]:
        """Values."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """softmax(Q K^T / sqrt(d)) V; where a bool mask is True, a query may attend."""
        ...

    def probabilities(self, q: Tensor, k: Tensor) -> Float[Tensor, "branches 2 heads tokens keys"]:
        """softmax(Q K^T / sqrt(d)), in fp32."""
        ...

    def read(self, probabilities: Tensor, v: Tensor) -> Float[Tensor, "branches 2 tokens dim"]:
        """What is read of V with these probabilities, the heads merged."""
        ...


@runtime_checkable
class Model(Protocol):
    """The frozen network, as methods see it; paths are module paths of its U-Net."""

    @property
    def self_attentions(self) -> Sequence[str]:
        """Their paths, in the order of the forward."""
        ...

    @property
    def cross_attentions(self) -> Sequence[str]:
        """The same of cross-attentions."""
        ...

    @property
    def decoder(self) -> Sequence[tuple[str, Sequence[str]]]:
        """Its layers in the order of the forward: the last convolution's path, and its self-attentions'."""
        ...

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The network's parameters by their paths; nobody changes them."""
        ...

    def weighed(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """The context in which the network has these weights in place of its own of the same paths."""
        ...

    def embed(self, prompts: list[str]) -> Float[Tensor, "n L d"]:
        """The prompts as the network reads them."""
        ...

    def vectors(self, word: str) -> Float[Tensor, "tokens e"]:
        """The vectors of a word's tokens before they are read, in fp32."""
        ...

    def embed_with(
        self, prompts: list[str], words: Mapping[str, Float[Tensor, "_ e"]]
    ) -> Float[Tensor, "n L d"]:
        """The prompts with these vectors for these words, wherever they stand; gradients reach them."""
        ...

    def tokens(self, prompt: str) -> list[str]:
        """The prompt's tokens; the last one of a word ends in </w>."""
        ...

    def places(self, prompt: str) -> Sequence[range]:
        """Their places in what `embed` gives for the prompt alone: 1 ... n, in a second chunk further on.

        Beside a longer prompt, a prompt is repeated until both are of one length.
        """
        ...

    def positions(self, prompt: str, word: str) -> list[int]:
        """The places of a word in a prompt; a UserError if it is not there."""
        ...

    def predict(
        self, z: Float[Tensor, "rows c h w"], t: Tensor, contexts: Float[Tensor, "branches rows L d"]
    ) -> Float[Tensor, "branches rows c h w"]:
        """The network's output under every branch's prompts, at one timestep."""
        ...

    def controlled(self, i: int, control: Control) -> AbstractContextManager[None]:
        """The context in which attentions and convolutions go through the control, at step i."""
        ...


@dataclass(eq=False)
class Scene:
    """A picture and its prompts, as methods are given them."""

    model: Model
    table: StepTable
    z_0: Float[Tensor, "1 c h w"]
    source: str
    target: str
    guidance: float
    """Of the target."""

    @cached_property
    def contexts(self) -> Float[Tensor, "3 L d"]:
        """Of the empty prompt, the source and the target."""
        return self.model.embed(["", self.source, self.target])

    def eps(self, guidance: float) -> Eps:
        """The network under the source prompt."""
        contexts = self.contexts[:2, None][-branches_at(guidance) :]

        def eps(z: Tensor, t: Tensor) -> Tensor:
            out = self.model.predict(z, t[:1], contexts)
            return out[0] + guidance * (out[-1] - out[0]) if len(out) == 2 else out[0]

        return eps

    def pivots(self, guidance: float = 1.0) -> Float[Tensor, "levels 1 c h w"]:
        """z-hat_T ... z-hat_0 by DDIM run backwards: level i is where step i begins."""
        return invert(self.eps(guidance), self.z_0, self.table).flip(0)


@dataclass(eq=False)
class Inverted:
    """What an inversion leaves: where sampling begins, and how it makes a step; this one makes DDIM's.

    Its scene is what an edit is given: an inversion may have put a word into the prompts.
    """

    scene: Scene
    start: Float[Tensor, "1 c h w"]
    """Of both source and target."""
    first: int = 0
    """The step that begins there, counted from noise."""
    source_guidance: float | None = None
    """Of the source's row; None: as the target's."""
    negative: Float[Tensor, "1 L d"] | None = field(default=None, repr=False)
    """What the unconditional branch reads; None: the empty prompt."""
    weights: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Of the network, in sampling; where there are none, its own."""
    read: Float[Tensor, "2 L d"] | None = field(default=None, repr=False)
    """What the conditional branch of source and target reads; None: their prompts."""

    @cached_property
    def scales(self) -> tuple[float, float]:
        """The guidance scales of source and target."""
        w = self.scene.guidance
        return (w if self.source_guidance is None else self.source_guidance), w

    def contexts(self, i: int) -> Float[Tensor, "branches 2 L d"]:
        """What source and target read at step i, in every branch."""
        given = self.scene.contexts
        negative = given[:1] if self.negative is None else self.negative
        both = torch.stack([negative.expand(2, -1, -1), given[1:] if self.read is None else self.read])
        return both[-max(branches_at(w) for w in self.scales) :]

    def seen(self, i: int, z: Float[Tensor, "2 c h w"]) -> Float[Tensor, "2 c h w"]:
        """The latents that the network is given at step i: those where the step begins."""
        return z

    def guided(self, i: int, out: Float[Tensor, "branches 2 c h w"]) -> Float[Tensor, "2 c h w"]:
        """The branches as one output."""
        w = torch.tensor(self.scales, device=out.device).view(2, 1, 1, 1)
        # at 1 the conditional branch itself, without rounding
        return torch.where(w == 1, out[-1], out[0] + w * (out[-1] - out[0]))

    def step(
        self, i: int, z: Float[Tensor, "2 c h w"], out: Float[Tensor, "2 c h w"]
    ) -> Float[Tensor, "2 c h w"]:
        """Step i of source and target, by the guided output."""
        return self.scene.table.forward(z, out, i)


class Control:
    """What an edit does in sampling; this one does nothing. The step is always given, and never counted."""

    attentions: Collection[str] = ()
    """The paths of the attentions that `attend` takes over."""

    convolutions: Collection[str] = ()
    """The paths of the convolutions whose outputs go through `convolve`."""

    def attend(self, i: int, at: Attending) -> Float[Tensor, "branches 2 tokens dim"]:
        """The output of one attention at step i."""
        return at.attend(at.q, at.k, at.v)

    def convolve(
        self, i: int, path: str, x: Float[Tensor, "branches 2 c h w"]
    ) -> Float[Tensor, "branches 2 c h w"]:
        """The output of one convolution at step i, x being its own."""
        return x

    def contexts(self, i: int, given: Float[Tensor, "branches 2 L d"]) -> Float[Tensor, "branches 2 L d"]:
        """What source and target read at step i, given what the inversion has them read."""
        return given

    def before(self, i: int, z: Float[Tensor, "2 c h w"]) -> Float[Tensor, "2 c h w"]:
        """The latents before step i."""
        return z

    def after(self, i: int, z: Float[Tensor, "2 c h w"]) -> Float[Tensor, "2 c h w"]:
        """The latents after step i."""
        return z


@runtime_checkable
class Inversion(Protocol):
    """From a picture to where sampling begins."""

    @property
    def guidance(self) -> float:
        """The published scale of the target, where the edit has none of its own."""
        ...

    def invert(self, scene: Scene) -> Inverted:
        """Invert the source."""
        ...


@runtime_checkable
class Editor(Protocol):
    """From source to target, in sampling."""

    @property
    def guidance(self) -> float | None:
        """The published scale of the target; None: the inversion's."""
        ...

    @property
    def empty_source(self) -> bool:
        """Whether the source prompt is left empty, in the inversion too."""
        ...

    def control(self, scene: Scene, inverted: Inverted) -> Control:
        """What happens in sampling."""
        ...


@runtime_checkable
class Renderer(Protocol):
    """A method that is no pair of inversion and edit: it has a picture rendered by means of its own."""

    def render(
        self, model: Any, picture: Any, source: str, target: str, steps: int | None, guidance: float | None
    ) -> Any:
        """The edited picture, or it and the reconstruction; None are the method's own steps and guidance."""
        ...


@torch.no_grad()
def sample(scene: Scene, inverted: Inverted, control: Control) -> Float[Tensor, "2 c h w"]:
    """Source and target from where the inversion arrived, each step under the control."""
    z = inverted.start.expand(2, -1, -1, -1)
    with scene.model.weighed(inverted.weights):
        for i in range(inverted.first, len(scene.table)):
            z = control.before(i, z)
            with scene.model.controlled(i, control):
                t = scene.table.timesteps[i : i + 1].to(z.device)
                contexts = control.contexts(i, inverted.contexts(i))
                out = scene.model.predict(inverted.seen(i, z), t, contexts)
            z = control.after(i, inverted.step(i, z, inverted.guided(i, out)))
    return z
