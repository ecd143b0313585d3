"""KV Inversion as a pipeline of diffusers; inside is the module, by the calls of `kvinv_pl.api`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from typing_extensions import Self

from kvinv_pl.api import KVInverter, Picture, Run, load_module, settings_to_open
from kvinv_pl.app.on_one_device import ACCELERATORS, OnOneDevice, one_device
from kvinv_pl.app.progress_bar import ProgressBar
from kvinv_pl.data.files import TEMPORARY, explaining_os_errors
from kvinv_pl.data.pictures import open_picture
from kvinv_pl.data.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.training.precision import COMPUTE_DTYPES


class KVInversionPipeline(OnOneDevice):
    """Tune a picture, then edit it by text.

    Examples:
        >>> from kvinv_pl import KVInversionPipeline
        >>> pipe = KVInversionPipeline.from_pretrained("menagerie", steps=4)  # 50, left out; 4 show little
        >>> pipe.set_progress_bar_config(disable=True)
        >>> picture = "examples/animal.png"
        >>> reconstruction = pipe.tune(picture, "a striped blue cat standing on sand")
        >>> image = pipe("a striped blue cat running on sand", start=0.1).images[0]
        >>> image.size
        (128, 128)

        The tuned picture is kept, and opened again without its tuning:

        >>> pipe.save_pretrained("cat")
        >>> again = KVInversionPipeline.from_pretrained("cat")
        >>> again.set_progress_bar_config(disable=True)
        >>> again("a striped blue cat running on sand", start=0.1).images[0] == image
        True
    """

    _callback_tensor_inputs = ("latents",)

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> None:
        """Take the parts; `from_pretrained` is how one is made."""
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler
        )
        self._run: Run | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | None = None,
        device_map: str | None = None,
        **settings: Any,
    ) -> Self:
        """Load a checkpoint to tune pictures with, or a tuned picture with its checkpoint.

        Args:
            pretrained_model_name_or_path: What `load` takes: a folder as diffusers saves it, a .safetensors
                file, a hub id, "menagerie"; or what `save_pretrained` wrote, or any run folder.
            torch_dtype: Of the U-Net and the text model: float32 (the default), bfloat16 or (on a GPU)
                float16. A tuned picture has its own.
            device_map: cpu, cuda or mps, for the whole model, as `to`.
            **settings: Arguments of KVInversion, such as steps=50, start=0.1 or attention="low_rank".
        """
        name = os.fspath(pretrained_model_name_or_path)
        found: dict[str, Any] = {"checkpoint": name}
        folder = Path(name).expanduser()
        tuned = RunStore(folder).has_run()
        if tuned:
            found = settings_to_open(folder)
        precision = found.pop("precision", "32-true")
        if torch_dtype is not None:
            held_in = {dtype: name for name, dtype in COMPUTE_DTYPES.items()}
            if torch_dtype not in held_in:
                raise UserError(f"torch_dtype: expected float32, bfloat16 or float16, got {torch_dtype}")
            precision = held_in[torch_dtype]
        module = load_module(**{**found, **settings})
        backbone = module.load_backbone(COMPUTE_DTYPES[precision])
        parts = {part: getattr(backbone, part) for part in cls._get_signature_keys(cls)[0]}
        pipe = cls(**parts)
        pipe._module, pipe._precision = module, precision
        if device_map is not None:
            pipe.to(one_device("device_map", device_map))
        if tuned:
            pipe._run = Run(pipe._inverter(), folder)
        return pipe

    # ---- the three stages

    def invert(
        self,
        image: Picture,
        prompt: str = "",
        mask: Picture | None = None,
        geometry: Literal["keep", "crop"] = "keep",
        out: str | Path | None = None,
    ) -> None:
        """Stage 1: find the trajectory of a picture, which is the pipeline's picture from here on.

        Args:
            image: A picture of pillow, an array of 8 bits (height, width, 3), or a path.
            prompt: What it shows; may be empty.
            mask: Of the subject, for variants that take one.
            geometry: keep, or crop.
            out: The run folder, gone on with if it exists; None: a temporary one.
        """
        with self._stage():
            self._run = self._inverter().tune(image, prompt, out, mask, geometry, stage="invert")

    def tune(self, image: Picture | None = None, prompt: str = "", **options: Any) -> Image.Image:
        """Stage 2: learn psi of a picture, or of the one that `invert` was given; its reconstruction.

        Args:
            image: As `invert` takes it, with what else it takes; None: the picture that is inverted.
            prompt: What it shows.
            **options: mask, geometry and out, as `invert` has them.
        """
        with self._stage():
            if image is not None:
                self._run = self._inverter().tune(image, prompt, **options)
            elif prompt or options:
                raise UserError("tune: expected an image with its prompt and options, got no image")
            else:
                self._picture().tune()
        return self._picture().reconstruction

    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Self, int, int, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **settings: Any,
    ) -> Any:
        """Stage 3: the tuned picture edited to each prompt; nothing is random, and nothing tuned again.

        Args:
            prompt: What it should become; several are rendered together.
            negative_prompt: Of the unconditional branch.
            guidance_scale: w of the edit; left out, that of the tuning.
            output_type: pil, np or pt.
            return_dict: Whether to return an ImagePipelineOutput or a tuple of its images.
            callback_on_step_end: Called after each step with the pipeline, the step's index, its timestep and
                the tensors asked for; "latents" in the dict that it returns take the place of the edit's.
            callback_on_step_end_tensor_inputs: Which tensors it is given.
            **settings: Of this edit, as KVInversion has them: start, reading, sharpness and so on.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if output_type not in ("pil", "np", "pt"):
            raise UserError(f"output_type: expected pil, np or pt, got {output_type!r}")
        given = {"negative": negative_prompt, "guidance": guidance_scale}
        settings = {**settings, **{name: value for name, value in given.items() if value is not None}}
        run = self._picture()
        run.owner.after_step = self._as_after_step(callback_on_step_end, callback_on_step_end_tensor_inputs)
        each = list(dict.fromkeys(prompts))
        with self._stage():
            files = dict(zip(each, run.edits(each, **settings), strict=True))
        images: Any = [open_picture(files[text]).image for text in prompts]
        if output_type != "pil":
            images = VaeImageProcessor.pil_to_numpy(images)
            images = VaeImageProcessor.numpy_to_pt(images) if output_type == "pt" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]  # what it saves is a run folder
        self, save_directory: str | os.PathLike[str], **unused: Any
    ) -> None:
        """Save the tuned picture, with everything but the checkpoint, as a run folder.

        `from_pretrained` opens it again, as does `kvinv edit --run`.

        Args:
            save_directory: A folder that is new or empty.
            **unused: None.
        """
        run, target = self._picture(), Path(save_directory).expanduser()
        if unused:
            raise UserError(f"save_pretrained takes a folder alone, got {next(iter(unused))} as well")
        if "reconstruction" not in RunStore(run.folder).read_run():
            raise UserError("save_pretrained: the picture is not tuned to the end: call tune() first")
        if target.exists() and any(target.iterdir()):
            raise UserError(
                f"save_directory: expected a new folder, got {target}, in which there is something"
            )
        passing = shutil.ignore_patterns(".lock*", "logs", f"*{TEMPORARY}")
        beside = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY}")
        with explaining_os_errors("write", target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copytree(run.folder, beside, ignore=passing)
                os.replace(beside, target)
            finally:
                shutil.rmtree(beside, ignore_errors=True)

    # ---- inside

    def _inverter(self) -> KVInverter:
        """The calls of the api, on this device."""
        if self._module is None:
            raise UserError(
                "expected a pipeline of KVInversionPipeline.from_pretrained, got one without a model"
            )
        accelerator = ACCELERATORS[self._device.type]
        found = KVInverter(self._module, accelerator=accelerator, precision=self._precision)
        found.progress = ProgressBar(self.progress_bar)
        return found

    def _picture(self) -> Run:
        """The picture that was inverted or tuned."""
        if self._run is None:
            raise UserError(
                "no picture is tuned: call tune(image, prompt) first, or open one by from_pretrained"
            )
        self._run.owner = self._inverter()  # the device may be another one by now
        return self._run

    def _as_after_step(
        self, callback: Callable[..., dict[str, Any]] | None, inputs: Sequence[str]
    ) -> Callable[[int, int, torch.Tensor], torch.Tensor | None] | None:
        """A callback of diffusers as a Watch has one."""
        if callback is None:
            return None
        inputs = getattr(callback, "tensor_inputs", inputs)  # of a PipelineCallback
        if unknown := [name for name in inputs if name not in self._callback_tensor_inputs]:
            raise UserError(f"callback_on_step_end_tensor_inputs: expected latents, got {unknown[0]!r}")

        def after_step(i: int, t: int, z: torch.Tensor) -> torch.Tensor | None:
            returned = callback(self, i, t, {"latents": z} if "latents" in inputs else {})
            return (returned or {}).get("latents")

        return after_step
