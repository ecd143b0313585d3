"""Psi of the slots that have stopped, while others are still tuned."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor, nn


class SlotKeeper:
    """Psi of slots that have stopped, so that the optimiser's momentum does not move them."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], slots: int, stopped: Bool[Tensor, " slots"]
    ) -> None:
        """Watch parameters whose first axis is slots; `stopped` slots (padding) are ignored."""
        self.parameters = list(parameters)
        self.stopped = stopped.clone()  # on the host: to ask for it must not wait for the device
        self.kept = [parameter.detach().clone() for parameter in self.parameters] if slots > 1 else []

    @property
    def all_stopped(self) -> bool:
        """Whether the phase is over."""
        return bool(self.stopped.all())

    @torch.no_grad()
    def stop(self, slots: Bool[Tensor, " slots"]) -> None:
        """Keep psi of these slots as it is now."""
        new = slots & ~self.stopped
        if self.kept and bool(new.any()):
            self._take(new, self.kept, self.parameters)
        self.stopped |= new

    @torch.no_grad()
    def zero_gradients(self, slots: Bool[Tensor, " slots"]) -> None:
        """Zero the gradients of slots that are no longer finite, which a gradient scaler would count."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad[slots] = 0.0

    @torch.no_grad()
    def restore(self) -> None:
        """Put stopped slots back after an optimiser step."""
        if self.kept and bool(self.stopped.any()):
            self._take(self.stopped, self.parameters, self.kept)

    @staticmethod
    def _take(slots: Bool[Tensor, " slots"], values: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Put what others have in these slots into values; by no index, which would wait for the device."""
        here = slots.to(values[0].device)
        for value, other in zip(values, others, strict=True):
            value.copy_(torch.where(here.view(-1, *[1] * (value.ndim - 1)), other, value))
