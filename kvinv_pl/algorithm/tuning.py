"""Stage 2: one reconstruction step and what it misses."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvinv_pl.algorithm.ddim import on_device
from kvinv_pl.algorithm.inversion import Eps
from kvinv_pl.algorithm.schedule import Schedule


def reconstruct(
    eps: Eps, z_t: Float[Tensor, "slots c h w"], table: Schedule, i: int | Int[Tensor, " slots"]
) -> Float[Tensor, "slots c h w"]:
    """z-tilde_{t-1} from z-tilde_t (Eq. 4) at step i, counted from noise: one for all slots, or one each."""
    steps = torch.as_tensor(i).expand(len(z_t)).cpu()
    t = on_device(table.timesteps[steps], torch.long, z_t.device)
    return table.forward(z_t, eps(z_t, t), steps)


def squared_errors(
    pivot: Float[Tensor, "slots c h w"], z: Float[Tensor, "slots c h w"]
) -> Float[Tensor, " slots"]:
    """Eq. 3 for each slot: the sum over the latent of (z-hat_{t-1} - z-tilde_{t-1})^2, in fp32.

    A sum, because a mean over a Stable Diffusion latent would bring gradients down to Adam's eps.
    """
    return (pivot.float() - z.float()).square().flatten(1).sum(1)
