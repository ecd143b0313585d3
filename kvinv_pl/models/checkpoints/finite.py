"""Numbers that are not finite: refused where they arise, with what to do about them."""

import torch
from torch import Tensor

from kvinv_pl.errors import UserError

REMEDIES = {
    torch.float16: "it is too large for half precision: use precision bf16-mixed or 32-true",
    torch.bfloat16: "use precision 32-true",
}
DAMAGED = "the weights of this checkpoint are damaged: download or copy it again, or use another one"


def require_finite(x: Tensor, what: str, dtype: torch.dtype = torch.float32, also: str = "") -> Tensor:
    """The same tensor; raises UserError if a number in it is not finite.

    Args:
        x: What is checked; the device is waited for.
        what: What it is, for the message.
        dtype: In which it was computed.
        also: What else may help, for the message.
    """
    if not bool(x.isfinite().all()):
        raise UserError(f"{what} is not finite: {also}{REMEDIES.get(dtype, DAMAGED)}")
    return x
