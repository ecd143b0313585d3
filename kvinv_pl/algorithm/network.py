"""The frozen network as methods see it, and what an edit does in its forwards.

Source and target are sampled side by side. Tensors of a forward are (branches, 2, ...): the branches are the
unconditional one, where guidance runs, and the conditional one; of the rows, 0 is the source, 1 the target.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Attending:
    """One attention layer in one forward, whose rows are source and target in every branch."""

    path: str
    cross: bool
    """Whether the keys are a prompt's tokens."""
    grid: tuple[int, int]
    """Height and width of the map whose pixels are the queries."""
    q: Float[Tensor, "branches 2 tokens dim"]
    k: Float[Tensor, "branches 2 keys dim"]
    v: Float[Tensor, "branches 2 keys dim"]
    attend: Callable[..., Tensor]
    """attend(q, k, v, mask=None): softmax(Q K^T / sqrt(d)) V; a mask is True where a query may attend."""
    heads: int
    scale: float

    def probabilities(self, q: Tensor, k: Tensor) -> Float[Tensor, "branches 2 heads tokens keys"]:
        """softmax(Q K^T / sqrt(d)), in fp32."""
        queries, keys = (x.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for x in (q, k))
        return (self.scale * queries.float() @ keys.float().transpose(-2, -1)).softmax(-1)

    def read(self, probabilities: Tensor, v: Tensor) -> Float[Tensor, "branches 2 tokens dim"]:
        """What is read of V with these probabilities, the heads merged."""
        values = v.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        return (probabilities.to(v.dtype) @ values).transpose(-3, -2).flatten(-2)


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


def naming_grid(layers: Mapping[tuple[int, int], int]) -> tuple[int, int]:
    """The grid of the cross-attention maps that say best where a word is, given how many layers have each.

    It is the coarsest that several layers have: 16 x 16 of Stable Diffusion's at 512 pixels, the published
    one. A coarser one is the middle's alone.
    """
    several = [grid for grid, count in layers.items() if count > 1] or list(layers)
    return min(several, key=lambda grid: grid[0] * grid[1])


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
        """The network's output under every branch's prompts, at one timestep or at each row's."""
        ...

    def controlled(self, i: int, control: Control) -> AbstractContextManager[None]:
        """The context in which attentions and convolutions go through the control, at step i."""
        ...
