"""The frozen model with psi attached: what the three stages call as epsilon."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvinv_pl.algorithm.editing import branches_at, guided
from kvinv_pl.algorithm.schedule import Schedule
from kvinv_pl.attention.attachment import Attachment, attach
from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.attention.sites import Selection, Site, select, self_attentions
from kvinv_pl.errors import UserError
from kvinv_pl.models.feature_cache import FeatureCache
from kvinv_pl.models.stable_diffusion import Backbone


class Denoiser(nn.Module):
    """A backbone, the chosen sites, and one live psi for latents of one size."""

    def __init__(
        self, backbone: Backbone, variant: Callable[[Site], CPAttention], selection: Selection, steps: int
    ) -> None:
        """Nothing is attached yet; `autocast` may be set to the precision's own context."""
        super().__init__()
        self.backbone, self.variant, self.selection = backbone, variant, selection
        self.table: Schedule = backbone.step_table(steps)
        self.psi = nn.ModuleDict()
        self.autocast: Callable[[], AbstractContextManager[object]] = nullcontext
        self.attachment: Attachment | None = None
        self.cache = FeatureCache(backbone.unet, [])
        self._found: dict[tuple[int, int], list[Site]] = {}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.alphas_cumprod.device

    @property
    def cps(self) -> list[CPAttention]:
        """The variant at every site, in the order of the forward."""
        return [cp for cp in self.psi.values() if isinstance(cp, CPAttention)]

    def place(self, grid: tuple[int, int], slots: int) -> Attachment:
        """Psi for latents of this height and width, attached; one of another shape is detached first."""
        if grid not in self._found:
            self._found[grid] = select(self_attentions(self.backbone.unet, grid), self.selection)
        sites = [Site(site.path, slots, site.grid, site.dim, site.heads) for site in self._found[grid]]
        if self.attachment is None or [cp.site for cp in self.cps] != sites:
            self.release()
            variants = {site.path: self.variant(site) for site in sites}
            # a ModuleDict's keys have no dots
            self.psi = nn.ModuleDict({path.replace(".", "/"): cp for path, cp in variants.items()}).to(
                self.device
            )
            self.attachment = attach(self.backbone.unet, variants)
            self.cache = FeatureCache(self.backbone.unet, variants.values())
        self.attachment.check()
        return self.attachment

    def release(self) -> None:
        """Detach psi from the U-Net."""
        if self.attachment is not None:
            self.attachment.detach()
            self.attachment, self.psi = None, nn.ModuleDict()
            self.cache = FeatureCache(self.backbone.unet, [])

    def attached(self) -> Attachment:
        """The attachment, checked."""
        if self.attachment is None:
            raise RuntimeError("place() comes first: no psi is attached")
        self.attachment.check()
        return self.attachment

    def branches(
        self, z: Float[Tensor, "rows c h w"], t: Tensor, contexts: Float[Tensor, "branches rows L d"]
    ) -> Float[Tensor, "branches rows c h w"]:
        """What the network gives for the same latents under every branch's prompts."""
        count = len(contexts)
        with self.autocast():
            eps = self.backbone.predict(z.repeat(count, 1, 1, 1), t.repeat(count), contexts.flatten(0, 1))
        return eps.unflatten(0, (count, -1))

    def guided_prediction(
        self, contexts: Float[Tensor, "2 rows L d"], w: float
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """As (z, t) -> output at guidance w; contexts are unconditional, then conditional."""
        return lambda z, t: guided(self.branches(z, t, contexts[-branches_at(w) :]), (w,))

    def bind(self, masks: Float[Tensor, "slots h w"] | None) -> None:
        """Pass the masks of the slots to every site; refuse variants that take none."""
        for cp in self.cps:
            if masks is not None and not cp.takes_masks:
                raise UserError(
                    f"a mask was given, but {type(cp).__name__} takes none: "
                    "leave it out, or use a variant that does, such as masked"
                )
            cp.bind(None if masks is None else masks.to(self.device))

    def values(self) -> dict[str, Tensor]:
        """Every value of psi under "<module path>.<name>", as the store keeps it: parameters and buffers."""
        return {f"{cp.site.path}.{name}": value for cp in self.cps for name, value in cp.state_dict().items()}

    def why_not(self, reading: str) -> str | None:
        """Why this reading makes no sense with the variant; None where it does."""
        return next(
            (f"with {type(cp).__name__} {why}" for cp in self.cps if (why := cp.why_not(reading))), None
        )

    @property
    def learns(self) -> bool:
        """Whether there is anything to optimise in the psi that is attached."""
        return any(True for _ in self.psi.parameters())

    @property
    def at_pivot(self) -> bool:
        """Whether K-bar and V-bar are those of the pass at z-hat_t."""
        return any(cp.at_pivot for cp in self.cps)

    @torch.no_grad()
    def read(self, psi: Mapping[str, Tensor], slot: int) -> None:
        """Put a stored psi_t into one slot."""
        for name, value in self.values().items():
            value[slot] = psi[name].to(value.device, value.dtype)

    @torch.no_grad()
    def reset(self, seed: int, pictures: Sequence[str], steps: Sequence[int]) -> None:
        """Psi at the variant's own start, random in (seed, picture, site, step) alone; one of each a slot."""
        for slot, (picture, step) in enumerate(zip(pictures, steps, strict=True)):
            for cp in self.cps:
                # one slot at a time, so that a start is independent of the other slots
                single = self.variant(Site(cp.site.path, 1, cp.site.grid, cp.site.dim, cp.site.heads))
                single.reset(generator(seed, f"{picture} {cp.site.path}", step))
                start = single.state_dict()
                for name, value in cp.state_dict().items():
                    value[slot] = start[name][0].to(value.device)

    @torch.no_grad()
    def observe(self, z: Tensor, t: Tensor, contexts: Tensor) -> None:
        """Show the source's own K and V (conditional branch) to variants that want them."""
        if any(cp.observes for cp in self.cps):
            with self.attached().observing() as kv:
                self.branches(z, t, contexts[1:])
            for cp in self.cps:
                k, v = kv[cp.site.path]
                cp.observe(k[-1].float(), v[-1].float())


def generator(seed: int, picture: str, step: int) -> torch.Generator:
    """A CPU generator for one phase of one picture, independent of the batch and the device."""
    digest = hashlib.blake2b(f"{seed} {picture} {step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
