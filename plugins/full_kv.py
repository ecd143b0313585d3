"""The paper's own variant."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvinv_pl.attention import CPAttention, Site
from kvinv_pl.errors import UserError


class FullKV(CPAttention):
    """A learned K-hat and V-hat for every token, blended with K and V (Eq. 1 as printed).

    Args:
        site: The self-attention to upgrade.
        start: zeros: K-hat = V-hat = 0, gamma 1. noise: normal K-hat and V-hat, gamma 0. source: K-hat and
            V-hat are the source's own K and V, with lambda 0 and gamma 1.
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
        hat, factor = (site.slots, site.tokens, site.dim), (site.slots, 1, scales[scale])
        self.k_hat, self.v_hat = (nn.Parameter(torch.empty(hat, dtype=torch.float32)) for _ in range(2))
        self.lambda_k, self.gamma_k, self.lambda_v, self.gamma_v = (
            nn.Parameter(torch.empty(factor, dtype=torch.float32)) for _ in range(4)
        )
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Go back to the identity: nothing learned."""
        for hat in (self.k_hat, self.v_hat):
            if self.start == "noise":
                device = generator.device if generator is not None else None
                hat.copy_(torch.randn(hat.shape, generator=generator, device=device).mul_(self.noise_std))
            else:
                hat.zero_()
        self._scale(lambda_=1.0, gamma=0.0 if self.start == "noise" else 1.0)

    @torch.no_grad()
    def observe(self, k: Float[Tensor, "slots tokens dim"], v: Float[Tensor, "slots tokens dim"]) -> None:
        """Start from the source's own K and V, if `start` says so."""
        if self.start == "source":
            self.k_hat.copy_(k)
            self.v_hat.copy_(v)
            self._scale(lambda_=0.0, gamma=1.0)

    def forward(
        self, k: Float[Tensor, "branches slots tokens dim"], v: Float[Tensor, "branches slots tokens dim"]
    ) -> tuple[Float[Tensor, "branches slots tokens dim"], Float[Tensor, "branches slots tokens dim"]]:
        """Eq. 1: K-bar = lambda_k K + gamma_k K-hat, and V-bar likewise."""
        k_bar = self.per_channel(self.lambda_k) * k + self.per_channel(self.gamma_k) * self.k_hat
        v_bar = self.per_channel(self.lambda_v) * v + self.per_channel(self.gamma_v) * self.v_hat
        return k_bar, v_bar

    def _scale(self, lambda_: float, gamma: float) -> None:
        for factor in (self.lambda_k, self.lambda_v):
            factor.fill_(lambda_)
        for factor in (self.gamma_k, self.gamma_v):
            factor.fill_(gamma)
