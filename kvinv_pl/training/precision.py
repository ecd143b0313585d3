"""The precision that the U-Net and the text model are held in; psi is in fp32 always."""

from collections.abc import Callable

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import nn
from torch.optim import Optimizer

from kvinv_pl.errors import UserError
from kvinv_pl.optimizers import needs_closure

COMPUTE_DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
AUTO = "auto"
LEAST_LOSS_SCALE = 2.0**-24
"""Of a scale of the loss: what overflows even there is not finite at any."""


def check_precision(precision: str, accelerator: str) -> None:
    """Refuse what is no precision, or none that this machine has."""
    if precision not in (AUTO, *COMPUTE_DTYPES):
        known = ", ".join((AUTO, *COMPUTE_DTYPES))
        raise UserError(f"precision: expected {known}, got {precision}: psi is tuned in fp32")
    if precision == "16-mixed" and (accelerator == "cpu" or not torch.cuda.is_available()):
        raise UserError("precision 16-mixed needs a GPU: use bf16-mixed or 32-true on a CPU")


def overflows(plugin: Precision) -> Callable[[], bool]:
    """Whether a step of the optimiser was left out because gradients overflowed, asked after each.

    The scale of the loss (16-mixed) is then smaller than before, and the step may be made again.
    """
    scaler = getattr(plugin, "scaler", None)
    scale = 0.0 if scaler is None else scaler.get_scale()

    def overflowed() -> bool:
        nonlocal scale
        before, scale = scale, 0.0 if scaler is None else scaler.get_scale()
        return LEAST_LOSS_SCALE <= scale < before

    return overflowed


def refuse_loss_scaling(optimizer: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    """Refuse an optimiser that evaluates the loss itself, where 16-mixed would scale it."""
    instance = optimizer([nn.Parameter(torch.zeros(1))])
    if needs_closure(instance):
        raise UserError(
            f"precision: 16-mixed scales the loss, and {type(instance).__name__} evaluates it itself: "
            "use bf16-mixed or 32-true"
        )


def precision_for(checkpoint: str, device: torch.device) -> str:
    """What auto means: bf16-mixed on a GPU of NVIDIA or AMD that has it, and 32-true elsewhere.

    The embedded model is small enough for 32-true everywhere, in which its figures were measured. A CPU never
    changes by itself what comes out, whatever its instruction set.
    """
    if checkpoint == "menagerie" or device.type != "cuda":
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def precision_of(dtype: torch.dtype) -> str:
    """The precision in which the U-Net is held in this dtype; full, if it is not half."""
    return next((name for name, held_in in COMPUTE_DTYPES.items() if held_in == dtype), "32-true")


def plugin_for(precision: str, device: torch.device) -> Precision:
    """Lightning's plugin of 32-true or bf16-mixed."""
    return Precision() if precision == "32-true" else MixedPrecision("bf16-mixed", device.type)
