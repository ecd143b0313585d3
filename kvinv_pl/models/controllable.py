"""A U-Net as methods to compare with see it: its layers by their paths, controlled or with other weights."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from kvinv_pl.algorithm.network import Control
from kvinv_pl.attention.control import controlled
from kvinv_pl.attention.cross_attention import cross_attentions
from kvinv_pl.attention.sites import self_attentions
from kvinv_pl.attention.unet import decoder_layers


class ControllableUNet:
    """What a `Model` of `kvinv_pl.algorithm.method` has of its U-Net, for latents of one size."""

    def __init__(self, unet: UNet2DConditionModel, grid: tuple[int, int]) -> None:
        """Find the attentions; nothing is put into the U-Net."""
        sites = self_attentions(unet, grid)
        self.unet = unet
        self.self_attentions = tuple(site.path for site in sites)
        self.cross_attentions = tuple(cross_attentions(unet))
        self.decoder = decoder_layers([path for path, _ in unet.named_modules()])
        self._grids = {site.tokens: site.grid for site in sites}

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The U-Net's parameters."""
        return dict(self.unet.named_parameters())

    def weighed(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """The U-Net with these weights."""
        return swapped_parameters(self.unet, weights)

    def controlled(self, i: int, control: Control) -> AbstractContextManager[None]:
        """The U-Net under a control, at step i."""
        return controlled(self.unet, self._grids, i, control)


@contextmanager
def swapped_parameters(network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Put these, which gradients may reach, in place of the parameters of the same paths; then undo it."""
    originals = dict(network.named_parameters())
    places = {path: path.rpartition(".") for path in weights}
    try:
        for path, (module, _, name) in places.items():
            # past register_parameter, which takes leaves alone
            network.get_submodule(module)._parameters[name] = weights[path].to(originals[path])  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for path, (module, _, name) in places.items():
            network.get_submodule(module)._parameters[name] = originals[path]  # pyright: ignore[reportArgumentType]
