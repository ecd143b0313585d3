"""What a pipeline is loaded from, and saved as."""

import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from typing_extensions import Self

from kvinv_pl.api import KVInverter, Run, load_module, settings_to_open
from kvinv_pl.app.progress_bar import ProgressBar
from kvinv_pl.app.single_device import ACCELERATORS, SingleDevicePipeline, one_device, precision_in
from kvinv_pl.data.runs.files import TEMPORARY, explaining_os_errors
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.precision import COMPUTE_DTYPES


class FromPretrained(SingleDevicePipeline):
    """A pipeline around the module of a checkpoint, with a tuned picture or without one."""

    def __init__(self) -> None:
        super().__init__()
        self._run: Run | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device_map: str | None = None,
        **settings: Any,
    ) -> Self:
        """Load a checkpoint to tune pictures with, or a tuned picture with its checkpoint.

        Args:
            pretrained_model_name_or_path: What `load` takes: a diffusers folder, a .safetensors file, a hub
                id or "menagerie"; or what `save_pretrained` wrote, or any run folder.
            dtype: The dtype of the U-Net and the text model: float32 (the default), bfloat16 or (on a GPU)
                float16; a tuned picture's default is its own.
            torch_dtype: The older name of dtype.
            device_map: cpu, cuda or mps, for the whole model, as in `to`.
            **settings: Arguments of KVInversion, such as steps=50, start=0.1 or attention="low_rank".
        """
        name = os.fspath(pretrained_model_name_or_path)
        found: dict[str, Any] = {"checkpoint": name}
        folder = Path(name).expanduser()
        tuned = RunStore(folder).has_run()
        if tuned:
            found = settings_to_open(folder)
        precision = found.pop("precision", "32-true")
        precision = precision_in(dtype, torch_dtype) or precision
        pipe = cls._around(load_module(**{**found, **settings}), precision)
        if device_map is not None:
            pipe.to(one_device("device_map", device_map))
        if tuned:
            pipe._run = Run(pipe._inverter(), folder)
        return pipe

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> Self:
        """Take the parts of a StableDiffusionPipeline, with LoRAs that are active; it stays as it is.

        Args:
            pipeline: The pipeline, whose parts are copied.
            dtype: As for `from_pretrained`.
            torch_dtype: The older name of dtype.
            **settings: As for `from_pretrained`.
        """
        precision = precision_in(dtype, torch_dtype) or "32-true"
        return cls._around(load_module(pipeline, **settings), precision)

    @classmethod
    def _around(cls, module: KVInversion, precision: str) -> Self:
        """A pipeline whose parts are the module's own."""
        backbone = module.load_backbone(COMPUTE_DTYPES[precision])
        pipe = cls(**{part: getattr(backbone, part) for part in cls._get_signature_keys(cls)[0]})
        pipe._module, pipe._precision = module, precision
        return pipe

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  # what it saves is a run folder
        self, save_directory: str | os.PathLike[str], **unused: Any
    ) -> None:
        """Save the tuned picture, with everything but the checkpoint, as a run folder.

        `from_pretrained` opens it again, as does `kvinv edit --run`.

        Args:
            save_directory: A new or empty folder.
            **unused: Not supported.
        """
        run = self._picture()
        if unused:
            raise UserError(
                f"save_pretrained takes only a folder, got the argument {next(iter(unused))} as well"
            )
        _save_run(run.folder, Path(save_directory).expanduser())

    def _inverter(self) -> KVInverter:
        if self._module is None:
            raise UserError(
                "expected a pipeline of KVInversionPipeline.from_pretrained, got one without a model"
            )
        accelerator = ACCELERATORS[self._device.type]
        return KVInverter(self._module, accelerator=accelerator, precision=self._precision)

    def _progress(self) -> ProgressBar:
        return ProgressBar(cast(Any, self).progress_bar)

    def _picture(self) -> Run:
        if self._run is None:
            raise UserError(
                "no picture is tuned: call tune(image, prompt) first, or open one by from_pretrained"
            )
        self._run.owner = self._inverter()  # the device may be another one by now
        return self._run


def _save_run(run: Path, target: Path) -> None:
    """Copy a tuned run to a folder that is new or empty, whole or not at all."""
    if "reconstruction" not in RunStore(run).read_run():
        raise UserError("save_pretrained: the picture is not tuned to the end: call tune() first")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"save_directory: expected an empty or new folder, got {target}, which is not empty")
    passing = shutil.ignore_patterns(".lock*", "logs", f"*{TEMPORARY}")
    temporary = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY}")
    with explaining_os_errors("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copytree(run, temporary, ignore=passing)
            if target.exists():  # which Windows would not replace, empty as it is
                target.rmdir()
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
