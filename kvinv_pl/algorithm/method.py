"""The seam for methods to compare with: what they are given, what an inversion leaves, and their sampling."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.ddim import StepTable
from kvinv_pl.algorithm.editing import branches_at, guided
from kvinv_pl.algorithm.inversion import Eps, invert
from kvinv_pl.algorithm.network import Attending as Attending  # for authors of methods, who import from here
from kvinv_pl.algorithm.network import Control, Model
from kvinv_pl.algorithm.network import naming_grid as naming_grid
from kvinv_pl.errors import UserError


def require_shares(**shares: float) -> None:
    """Refuse shares of the steps, by their options' names, that are not 0 to 1."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name}: expected a share of the steps, 0 to 1, got {value}")


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
        return lambda z, t: guided(self.model.predict(z, t[:1], contexts), (guidance,))

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
    """A method that is no pair of inversion and edit: it has a picture rendered by means of its own.

    One with an attribute `mask_given` that is true is given `mask` besides, a grey picture of the same size,
    white where the subject is. One with `prepare(model)` loads there what it needs, which a bench does not
    count among its time.
    """

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
