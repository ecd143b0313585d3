"""A pipeline whose model is on one device, or on the CPU between its stages."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from typing_extensions import Self

from kvinv_pl.errors import UserError
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.precision import COMPUTE_DTYPES, precision_of

ACCELERATORS = {"cpu": "cpu", "cuda": "gpu", "mps": "mps"}
"""Devices of torch, and what a trainer calls them."""
OF_PSI = "the attentions are those that psi is put into; torch's own kernels save memory without being asked"
ONE_DEVICE = "tuning takes gradients through the whole U-Net, which is on one device"


def one_device(name: str, given: str | torch.device) -> torch.device:
    """The device that is meant; raises UserError if it is several, or none of ours."""
    try:
        device = torch.device(given)
    except RuntimeError:  # balanced, auto
        device = torch.device("meta")
    if device.type not in ACCELERATORS or device.index:
        raise UserError(
            f"{name}: expected {', '.join(ACCELERATORS)}, got {given}: {ONE_DEVICE}; "
            "CUDA_VISIBLE_DEVICES says which GPU"
        )
    return torch.device(device.type)


def precision_in(dtype: torch.dtype | None, torch_dtype: torch.dtype | None) -> str | None:
    """What a trainer calls this dtype, which diffusers takes by an older name, too; None if none is given."""
    if dtype is not None and torch_dtype is not None:
        raise UserError("dtype: got both dtype and torch_dtype, its older name: pass dtype alone")
    given = torch_dtype if dtype is None else dtype
    if given not in (None, *COMPUTE_DTYPES.values()):
        raise UserError(f"dtype: expected float32, bfloat16 or float16, got {given}")
    return None if given is None else precision_of(given)


class SingleDevicePipeline(DiffusionPipeline):
    """Where the model is, in the words of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self._module: KVInversion | None = None
        self._device, self._precision, self._offloads = torch.device("cpu"), "32-true", False

    @property
    def device(self) -> torch.device:
        """Where the stages run."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the U-Net and the text model."""
        return COMPUTE_DTYPES[self._precision]

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move the model to a device, on which the stages run.

        Args:
            device: cpu, cuda or mps; a dtype alone may stand in its place.
            dtype: Only the dtype that it was loaded in.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype not in (None, self.dtype):
            raise UserError(f"dtype: already loaded in {self.dtype}: pass dtype={dtype} to from_pretrained")
        if device is None:
            return self
        place = one_device("device", device)
        if self._module is not None:
            self._module.to(place)
        self._device, self._offloads = place, False
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Have the model on the accelerator while a stage runs, and on the CPU between stages.

        Args:
            gpu_id: 0.
            device: The accelerator; None: the one there is.
        """
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        place = torch.device(device or found or "cpu")
        if place.type == "cpu" or gpu_id:
            raise UserError(
                f"enable_model_cpu_offload: expected the first accelerator, got {gpu_id or place}"
            )
        self.to("cpu")
        self._device, self._offloads = torch.device(place.type), True

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Refuse it."""
        raise UserError(f"enable_sequential_cpu_offload: {ONE_DEVICE}: take enable_model_cpu_offload")

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Refuse it."""
        raise UserError(f"enable_group_offload: {ONE_DEVICE}: take enable_model_cpu_offload")

    def set_attention_slice(self, slice_size: Any) -> None:
        """Refuse what would take psi out of the attentions."""
        raise UserError(f"enable_attention_slicing: {OF_PSI}")

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Refuse what would take psi out of the attentions."""
        raise UserError(f"enable_xformers_memory_efficient_attention: {OF_PSI}")

    @contextmanager
    def _stage(self) -> Iterator[None]:
        """Clear the accelerator after a stage, if it is offloaded."""
        try:
            yield
        finally:
            if self._offloads and self._module is not None:
                self._module.to("cpu")
                torch.accelerator.empty_cache()
