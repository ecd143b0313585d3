"""A network with other weights for a while, which gradients may reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def weighing(network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Put these in the place of the parameters of the same paths; afterwards its own are there again."""
    own = dict(network.named_parameters())
    places = {path: path.rpartition(".") for path in weights}
    try:
        for path, (module, _, name) in places.items():
            # past register_parameter, which takes leaves alone
            network.get_submodule(module)._parameters[name] = weights[path].to(own[path])  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for path, (module, _, name) in places.items():
            network.get_submodule(module)._parameters[name] = own[path]  # pyright: ignore[reportArgumentType]
