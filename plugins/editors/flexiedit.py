"""FlexiEdit (Koo et al., 2024): high frequencies are damped where something is to move."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.method import Attending, Control, Inverted, Scene, require_shares, sample
from kvinv_pl.errors import UserError

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class FlexiEdit:
    """FlexiEdit (Koo et al., 2024): damped latents, a first edit, re-inversion, and the source's K and V.

    In the region of the edit the high frequencies of z_T, beyond a Gaussian low-pass, are scaled by alpha,
    and noise of their range is added by 1 - alpha (latent refinement). The target is sampled from there
    without any control, its result is inverted by the source prompt up to a share of the steps, and sampled
    from there again with the source's K and V in the later self-attentions (re-inversion). The low-pass is
    two-dimensional; the authors' code runs it along a third axis of one entry, which leaves almost no low
    frequencies. The AdaIN of that code is left out.

    Args:
        region: Left, top, right and bottom of the region, in shares of the picture; left out, what attends to
            the words that the target alone has.
        threshold: Threshold of that attention, in a map from 0 to 1.
        alpha: Weight of the high frequencies, as published.
        cutoff: Cutoff of the low-pass filter, as published.
        reinversion: The share of the steps that is inverted again; published: 30 of 50.
        layer: The self-attention from which on the source's K and V are read, in the order of the forward;
            left out, 10 of Stable Diffusion's 16, and the same share of another U-Net's.
        seed: Seed of the noise.
        empty_source: Whether the source is inverted and sampled without its prompt.
        guidance: Guidance scale of the target, unless another is given; as published.
    """

    region: Box | None = None
    threshold: float = 0.15
    alpha: float = 0.7
    cutoff: float = 0.3
    reinversion: float = 0.6
    layer: int | None = None
    seed: int = 0
    empty_source: bool = False
    guidance: float | None = 7.5

    def __post_init__(self) -> None:
        """Refuse a region without an inside, and what is no share."""
        require_shares(reinversion=self.reinversion)
        if self.region is None:
            return
        left, top, right, bottom = self.region
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise UserError(f"region: expected left < right and top < bottom from 0 to 1, got {self.region}")

    def control(self, scene: Scene, inverted: Inverted) -> Control:
        """Damp, edit, and invert again."""
        every = scene.model.self_attentions
        layer = round(len(every) * 10 / 16) if self.layer is None else self.layer
        if not 0 <= layer < len(every):
            raise UserError(f"layer: expected 0 to {len(every) - 1}, got {layer}")
        where = self._inside(scene) if self.region is None else boxed(self.region, scene.z_0)
        refined = damped(inverted.start, where, self.alpha, self.cutoff, self.seed)
        steps = len(scene.table)
        first_reinverted = max(steps - int(self.reinversion * steps + 0.5), inverted.first)
        begins = {inverted.first: refined}
        z = sample(scene, inverted, Retarget(begins))[1:]
        eps = scene.eps(1.0)
        with scene.model.weighed(inverted.weights):
            for i in reversed(range(first_reinverted, len(scene.table))):
                t = scene.table.timesteps[i : i + 1].to(z.device)
                z = scene.table.back(z, eps(z, t), i)
        return Retarget({**begins, first_reinverted: z}, every[layer:], first_reinverted)

    def _inside(self, scene: Scene) -> Float[Tensor, "1 1 h w"]:
        """Where the picture attends to the words that the target alone has; everywhere if there are none."""
        known, tokens = set(scene.model.tokens(scene.source)), scene.model.tokens(scene.target)
        flat = [place for chunk in scene.model.places(scene.target) for place in chunk]
        places = [place for place, token in zip(flat, tokens, strict=True) if token not in known]
        if not places:
            return torch.ones_like(scene.z_0[:, :1])
        recorded, last = RecordedAttention(scene.model.cross_attentions, places), len(scene.table) - 1
        t = scene.table.timesteps[last:].to(scene.z_0.device)
        with scene.model.controlled(last, recorded):
            scene.model.predict(scene.z_0.expand(2, -1, -1, -1), t, scene.contexts[2].expand(1, 2, -1, -1))
        size = (scene.z_0.shape[-2], scene.z_0.shape[-1])
        mean = torch.stack([F.interpolate(found, size, mode="bilinear") for found in recorded.maps]).mean(0)
        return ((mean - mean.min()) / (mean.max() - mean.min()).clamp_min(1e-12) > self.threshold).float()


class Retarget(Control):
    """The target begins anew at some steps, and reads the source's K and V from one step on."""

    def __init__(self, begins: dict[int, Tensor], layers: Sequence[str] = (), first: int = 0) -> None:
        """`begins` are latents of the target, by their step."""
        self.begins, self.attentions, self.first = begins, tuple(layers), first

    def before(self, i: int, z: Float[Tensor, "2 c h w"]) -> Float[Tensor, "2 c h w"]:
        """The source as it is, the target where it begins."""
        return torch.cat([z[:1], self.begins[i].to(z)]) if i in self.begins else z

    def attend(self, i: int, at: Attending) -> Float[Tensor, "branches 2 tokens dim"]:
        """The target's queries with the K and V of the source's same branch."""
        if i < self.first:
            return at.attend(at.q, at.k, at.v)
        return at.attend(at.q, at.k[:, :1].expand_as(at.k), at.v[:, :1].expand_as(at.v))


class RecordedAttention(Control):
    """Keeps the attention to some tokens."""

    def __init__(self, attentions: Sequence[str], places: list[int]) -> None:
        """Watch these."""
        self.attentions, self.places = tuple(attentions), places
        self.maps: list[Float[Tensor, "1 1 h w"]] = []

    def attend(self, i: int, at: Attending) -> Float[Tensor, "branches 2 tokens dim"]:
        """The mean over the heads and the tokens."""
        found = at.probabilities(at.q, at.k)
        self.maps.append(found[-1, -1].mean(0)[:, self.places].mean(-1).view(1, 1, *at.grid))
        return at.read(found, at.v)


def boxed(region: Box, z: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 1 h w"]:
    """A region as a mask of latents, each pixel by its centre."""
    left, top, right, bottom = region
    y, x = ((torch.arange(side, device=z.device) + 0.5) / side for side in z.shape[-2:])
    inside = ((y >= top) & (y <= bottom))[:, None] & ((x >= left) & (x <= right))
    return inside[None, None].float()


def damped(
    z: Float[Tensor, "1 c h w"], where: Float[Tensor, "1 1 h w"], alpha: float, cutoff: float, seed: int
) -> Float[Tensor, "1 c h w"]:
    """Inside the mask, low frequencies, high ones times alpha, and noise times 1 - alpha."""
    y, x = (torch.fft.fftfreq(side, 0.5, device=z.device).float() for side in z.shape[-2:])
    low = torch.exp(-(y[:, None].square() + x.square()) / (2 * cutoff**2))
    filtered = torch.fft.ifft2(torch.fft.fft2(z.float()) * (low + alpha * (1 - low))).real
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z)
    noise = noise * (filtered.max() - filtered.min()) / (noise.max() - noise.min())
    return torch.where(where > 0, filtered + (1 - alpha) * noise, z)
