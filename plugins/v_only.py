"""V alone is learned; K stays the model's own."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvinv_pl.attention import CPAttention, Site
from kvinv_pl.errors import UserError


class VOnly(CPAttention):
    """A learned V-hat for every token (Eq. 1 on V); K-bar is the K of the pass, so nothing is learned on K.

    An edit that reads frozen gets the source's K with V-bar: rows of V-bar belong to those of the source's K.

    Args:
        site: The self-attention to upgrade.
        start: zeros: V-hat = 0, gamma 1. noise: normal V-hat, gamma 0. source: V-hat is the source's own V,
            with lambda 0 and gamma 1.
        noise_std: Standard deviation of the noise start.
        scale: Granularity of lambda and gamma: layer, head or channel.
    """

    def __init__(
        self,
        site: Site,
        start: Literal["zeros", "noise", "source"] = "zeros",
        noise_std: float = 1.0,
        scale: Literal["layer", "head", "channel"] = "layer",
    ):
        super().__init__(site)
        if start not in ("zeros", "noise", "source"):
            raise UserError(f"start: expected zeros, noise or source, got {start!r}")
        if start == "noise" and not noise_std > 0:
            raise UserError(f"noise_std: expected more than 0, got {noise_std}: nothing could be learned")
        scales = {"layer": 1, "head": site.heads, "channel": site.dim}
        if scale not in scales:
            raise UserError(f"scale: expected {', '.join(scales)}, got {scale!r}")
        self.start = start
        self.noise_std = noise_std
        self.observes = start == "source"
        self.v_hat = nn.Parameter(torch.empty(site.slots, site.tokens, site.dim, dtype=torch.float32))
        self.lambda_v, self.gamma_v = (
            nn.Parameter(torch.empty(site.slots, 1, scales[scale], dtype=torch.float32)) for _ in range(2)
        )
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Go back to the identity: nothing learned."""
        if self.start == "noise":
            device = generator.device if generator is not None else None
            noise = torch.randn(self.v_hat.shape, generator=generator, device=device)
            self.v_hat.copy_(noise.mul_(self.noise_std))
        else:
            self.v_hat.zero_()
        self.lambda_v.fill_(1.0)
        self.gamma_v.fill_(0.0 if self.start == "noise" else 1.0)

    @torch.no_grad()
    def observe(self, k: Float[Tensor, "slots tokens dim"], v: Float[Tensor, "slots tokens dim"]) -> None:
        """Start from the source's own V, if `start` says so."""
        if self.start == "source":
            self.v_hat.copy_(v)
            self.lambda_v.zero_()
            self.gamma_v.fill_(1.0)

    def forward(
        self, k: Float[Tensor, "branches slots tokens dim"], v: Float[Tensor, "branches slots tokens dim"]
    ) -> tuple[Float[Tensor, "branches slots tokens dim"], Float[Tensor, "branches slots tokens dim"]]:
        """Eq. 1 on V: V-bar = lambda_v V + gamma_v V-hat; K-bar = K."""
        return k, self.per_channel(self.lambda_v) * v + self.per_channel(self.gamma_v) * self.v_hat
