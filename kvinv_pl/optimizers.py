"""Optimisers of a phase: one for smooth least squares without noise, and helpers for any other."""

import inspect
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from kvinv_pl.errors import UserError

Residuals = Callable[[], Float[Tensor, "slots elements"]]
"""Residuals, z-tilde_{t-1} - z-hat_{t-1}, slot by slot; with a graph where gradients are enabled."""


class GaussNewtonDescent(Optimizer):
    """Descent with one scale for each tensor, and the step length of Gauss and Newton.

    The direction d is the gradient, divided in each tensor by its root mean square: K-hat, V-hat, lambda
    and gamma of unlike layers have gradients of unlike size, and all of them are to take part. A trial step
    h along it shows how the residuals r change, J d = (r(psi + h d) - r(psi)) / h, and the step that is made
    is the least-squares one, -<r, J d> / <J d, J d>. It costs a forward and backward, and a forward. Slots do
    not see each other, and nothing is carried from one step to the next.

    Args:
        params: Parameters whose first axis is slots.
        lr: Root mean square of the trial step h d.
        longest: The longest step, in trial steps.
    """

    reads_residuals = True

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-2, longest: float = 20.0):
        if not (lr > 0 and longest > 0):
            raise UserError(f"GaussNewtonDescent: expected lr and longest above 0, got {lr} and {longest}")
        super().__init__(params, {"lr": lr, "longest": longest})

    def step(self, closure: Residuals) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one step; `closure` gives the residuals at the parameters as they are."""
        self.zero_grad()
        with torch.enable_grad():
            residuals = closure()
            residuals.square().sum().backward()
        for group in self.param_groups:
            self._along(group["params"], group["lr"], group["longest"], residuals.detach(), closure)

    @torch.no_grad()
    def _along(self, params: list[Tensor], h: float, longest: float, r: Tensor, closure: Residuals) -> None:
        moved = [(p, p.clone(), _downhill(p.grad)) for p in params if p.grad is not None]
        for p, start, d in moved:
            p.copy_(start + h * d)
        change = closure() - r
        size = change.square().sum(1)
        length = torch.where(size > 0, -(change * r).sum(1) / size, 0)
        length = length.nan_to_num().clamp(0, longest)  # a trial that is not finite, or goes uphill: stay
        for p, start, d in moved:
            p.copy_(start + h * length.to(p.dtype).view(-1, *[1] * (p.ndim - 1)) * d)


def _downhill(gradient: Tensor) -> Tensor:
    """The way down, with a root mean square of 1 in each slot; nowhere where there is no gradient."""
    size = gradient.square().flatten(1).mean(1).sqrt().view(-1, *[1] * (gradient.ndim - 1))
    return torch.where(size > 0, -gradient / size, 0)


def reads_residuals(optimizer: Any) -> bool:
    """Whether the closure must return the residuals, slot by slot, as for GaussNewtonDescent."""
    return bool(getattr(getattr(optimizer, "optimizer", optimizer), "reads_residuals", False))


def needs_closure(optimizer: Any) -> bool:
    """Whether the optimiser evaluates the loss itself, as L-BFGS does."""
    step = getattr(optimizer, "optimizer", optimizer).step
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


class Renewal:
    """The initial state of an optimiser, to begin every phase with."""

    def __init__(self, optimizer: Any) -> None:
        """Save its groups; `optimizer` may be a wrapper that shares them."""
        self._groups = [
            deepcopy({key: group[key] for key in group if key != "params"})
            for group in optimizer.param_groups
        ]

    def renew(self, optimizer: Any) -> None:
        """Reset its state and groups; in place, because a wrapper shares it."""
        optimizer.state.clear()
        for group, new in zip(optimizer.param_groups, self._groups, strict=True):
            for key in group.keys() - new.keys() - {"params"}:
                del group[key]
            group.update(deepcopy(new))
