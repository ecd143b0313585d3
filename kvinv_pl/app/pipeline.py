"""KV Inversion as a pipeline of diffusers; inside is the module, by the calls of `kvinv_pl.api`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from kvinv_pl.api import Picture
from kvinv_pl.app.from_pretrained import FromPretrained
from kvinv_pl.data.images.geometry import Mode
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.errors import UserError
from kvinv_pl.stages.progress import AfterStep

NO_SETTINGS = {
    "num_inference_steps": "its steps are those of the tuning; from_pretrained(..., steps=...), tune again",
    "generator": "nothing in an edit is random, the same call gives the same picture",
    "height": "its size is that of the picture that was tuned",
    "width": "its size is that of the picture that was tuned",
}
"""Parameters that other pipelines have, and why an edit has not."""
GIVEN = ("latents",)
"""Which tensors a callback may ask for."""


class KVInversionPipeline(FromPretrained):
    """Tune a picture, then edit it by text.

    Examples:
        >>> from kvinv_pl import KVInversionPipeline
        >>> pipe = KVInversionPipeline.from_pretrained("menagerie", steps=2)  # 50, left out; 2 show little
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

    _callback_tensor_inputs = GIVEN

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> None:
        """Take the parts; `from_pretrained` is how one is made."""
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler
        )

    def invert(
        self,
        image: Picture,
        prompt: str = "",
        mask: Picture | None = None,
        geometry: Mode = "keep",
        out: str | Path | None = None,
    ) -> None:
        """Stage 1: find the trajectory of a picture, which is the pipeline's picture from here on.

        Args:
            image: A PIL image, a uint8 array (height, width, 3), or a path.
            prompt: What it shows; may be empty.
            mask: A mask of the subject, for variants that use one.
            geometry: keep, or crop.
            out: The run folder, resumed if it exists; None: a temporary one.
        """
        with self._stage():
            self._run = self._inverter().tune(
                image, prompt, out, mask, geometry, stage="invert", progress=self._progress()
            )

    def tune(self, image: Picture | None = None, prompt: str = "", **options: Any) -> Image.Image:
        """Stage 2: learn psi of a picture, or of the one that `invert` was given; its reconstruction.

        Args:
            image: As for `invert`; None: the picture that is inverted.
            prompt: What it shows.
            **options: mask, geometry and out, as for `invert`.
        """
        with self._stage():
            if image is not None:
                self._run = self._inverter().tune(image, prompt, progress=self._progress(), **options)
            elif prompt or options:
                raise UserError("tune: expected an image with its prompt and options, got no image")
            else:
                self._picture().tune(self._progress())
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
            negative_prompt: The negative prompt; left out, that of the tuning.
            guidance_scale: Guidance scale w of the edit; left out, that of the tuning.
            output_type: pil, np or pt.
            return_dict: Whether to return an ImagePipelineOutput or a tuple of its images.
            callback_on_step_end: Called after each step with the pipeline, the step's index, its timestep and
                the tensors asked for; "latents" in the dict that it returns take the place of the edit's.
            callback_on_step_end_tensor_inputs: Which tensors it is given.
            **settings: Settings of this edit, named as in KVInversion: start, reading, sharpness and so on.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if output_type not in ("pil", "np", "pt"):
            raise UserError(f"output_type: expected pil, np or pt, got {output_type!r}")
        for name in settings.keys() & NO_SETTINGS.keys():
            raise UserError(f"edit has no setting {name}: {NO_SETTINGS[name]}")
        given = {"negative": negative_prompt, "guidance": guidance_scale}
        settings = {**settings, **{name: value for name, value in given.items() if value is not None}}
        run = self._picture()
        after_step = _as_after_step(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        each = list(dict.fromkeys(prompts))
        with self._stage():
            paths = run.edits(each, progress=self._progress(), after_step=after_step, **settings)
        files = dict(zip(each, paths, strict=True))
        images: Any = [open_picture(files[text]).image for text in prompts]
        if output_type != "pil":
            images = VaeImageProcessor.pil_to_numpy(images)
            images = VaeImageProcessor.numpy_to_pt(images) if output_type == "pt" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _as_after_step(
    pipe: Any, callback: Callable[..., dict[str, Any]] | None, inputs: Sequence[str]
) -> AfterStep | None:
    """What is called after each step with its index, its timestep and the latents, and may return others.

    A PipelineCallback names its inputs itself.
    """
    if callback is None:
        return None
    inputs = getattr(callback, "tensor_inputs", inputs)
    if unknown := [name for name in inputs if name not in GIVEN]:
        raise UserError(f"callback_on_step_end_tensor_inputs: expected latents, got {unknown[0]!r}")

    def after_step(i: int, t: int, z: Tensor) -> Tensor | None:
        returned = callback(pipe, i, t, {"latents": z} if "latents" in inputs else {})
        return (returned or {}).get("latents")

    return after_step
