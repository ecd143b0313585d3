"""Nothing is learned: mutual self-attention as in MasaCtrl (Cao et al., 2023)."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from kvinv_pl.attention import CPAttention, Site
from kvinv_pl.errors import UserError


class Recorded(CPAttention):
    """The K and V of the source's own pass, untuned: edits attend to the source.

    Args:
        site: The self-attention to upgrade.
        at: Where that pass is made. rollout: at z-tilde_t, the source's own untuned roll-out. pivot: at
            z-hat_t of the inversion, as direct inversion has it; z-tilde then rolls out reading them.
    """

    def __init__(self, site: Site, at: Literal["rollout", "pivot"] = "rollout"):
        super().__init__(site)
        if at not in ("rollout", "pivot"):
            raise UserError(f"at: expected rollout or pivot, got {at!r}")
        self.at_pivot = at == "pivot"

    def why_not(self, reading: str) -> str | None:
        """Refuse blend."""
        return "nothing is learned, so it would be plain DDIM" if reading == "blend" else None

    def forward(
        self, k: Float[Tensor, "branches slots tokens dim"], v: Float[Tensor, "branches slots tokens dim"]
    ) -> tuple[Float[Tensor, "branches slots tokens dim"], Float[Tensor, "branches slots tokens dim"]]:
        """K-bar = K, V-bar = V."""
        return k, v
