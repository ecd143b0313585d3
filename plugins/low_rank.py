"""K-hat and V-hat as products of two narrow matrices, after LoRA (Hu et al., 2021)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvinv_pl.attention import CPAttention, Site
from kvinv_pl.errors import UserError


class LowRank(CPAttention):
    """K-hat = A_k B_k of low rank over tokens x channels, V-hat likewise: psi of rank (tokens + dim) values.

    Args:
        site: The self-attention to upgrade.
        rank: The rank, cut to the site's tokens or channels where it has fewer.
        start: zeros: B = 0 and A random, so that K-hat = V-hat = 0, gamma 1. noise: A and B random, gamma 0.
        noise_std: Standard deviation of K-hat and V-hat in the noise start.
        scale: Granularity of lambda and gamma: layer, head or channel.
    """

    def __init__(
        self,
        site: Site,
        rank: int = 8,
        start: Literal["zeros", "noise"] = "zeros",
        noise_std: float = 1.0,
        scale: Literal["layer", "head", "channel"] = "layer",
    ):
        super().__init__(site)
        if rank < 1:
            raise UserError(f"rank: expected 1 or more, got {rank}")
        if start not in ("zeros", "noise"):
            raise UserError(f"start: expected zeros or noise, got {start!r}")
        if start == "noise" and not noise_std > 0:
            raise UserError(f"noise_std: expected more than 0, got {noise_std}: nothing could be learned")
        scales = {"layer": 1, "head": site.heads, "channel": site.dim}
        if scale not in scales:
            raise UserError(f"scale: expected {', '.join(scales)}, got {scale!r}")
        self.rank = min(rank, site.tokens, site.dim)
        self.start = start
        self.noise_std = noise_std
        tall, wide = (site.slots, site.tokens, self.rank), (site.slots, self.rank, site.dim)
        factor = (site.slots, 1, scales[scale])
        self.a_k, self.a_v = (nn.Parameter(torch.empty(tall, dtype=torch.float32)) for _ in range(2))
        self.b_k, self.b_v = (nn.Parameter(torch.empty(wide, dtype=torch.float32)) for _ in range(2))
        self.lambda_k, self.gamma_k, self.lambda_v, self.gamma_v = (
            nn.Parameter(torch.empty(factor, dtype=torch.float32)) for _ in range(4)
        )
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Go back to the identity: nothing learned. With A = 0 as well, no gradient would reach A or B."""
        noise = self.start == "noise"
        for a in (self.a_k, self.a_v):
            a.copy_(_normal(a, generator) / self.rank**0.5)
        for b in (self.b_k, self.b_v):
            b.copy_(_normal(b, generator) * self.noise_std) if noise else b.zero_()
        for factor in (self.lambda_k, self.lambda_v):
            factor.fill_(1.0)
        for factor in (self.gamma_k, self.gamma_v):
            factor.fill_(0.0 if noise else 1.0)

    def forward(
        self, k: Float[Tensor, "branches slots tokens dim"], v: Float[Tensor, "branches slots tokens dim"]
    ) -> tuple[Float[Tensor, "branches slots tokens dim"], Float[Tensor, "branches slots tokens dim"]]:
        """Eq. 1 with K-hat = A_k B_k: K-bar = lambda_k K + gamma_k A_k B_k, and V-bar likewise."""
        k_bar = self.per_channel(self.lambda_k) * k + self.per_channel(self.gamma_k) * (self.a_k @ self.b_k)
        v_bar = self.per_channel(self.lambda_v) * v + self.per_channel(self.gamma_v) * (self.a_v @ self.b_v)
        return k_bar, v_bar


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal values in the shape of `like`, drawn where the generator is."""
    device = generator.device if generator is not None else None
    return torch.randn(like.shape, generator=generator, device=device)
