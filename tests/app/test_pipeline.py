"""The pipeline of diffusers: its words, and the same tuning and edits as everywhere else."""

from __future__ import annotations

import doctest
import io
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import fits
import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from fits import SOURCE, TARGET

import kvinv_pl
from kvinv_pl.app import pipeline
from kvinv_pl.app.pipeline import KVInversionPipeline
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError

ROOT = Path(__file__).parents[2]


def quiet(name: Path | str, **settings: Any) -> KVInversionPipeline:
    pipe = KVInversionPipeline.from_pretrained(name, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "run"


@pytest.fixture(scope="module")
def pipe(image: Path, folder: Path) -> KVInversionPipeline:
    pipe = quiet(fits.checkpoint(), optimizer=fits.adam(), **fits.QUICK)
    assert pipe.tune(image, SOURCE, out=folder).size == (45, 30)
    return pipe


def test_the_examples_of_the_docstring_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "animal.png", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    done = doctest.testmod(pipeline, raise_on_error=False)
    assert done.attempted > 8 and not done.failed


def test_it_is_a_pipeline_of_diffusers_with_the_parts_of_the_checkpoint(pipe: KVInversionPipeline) -> None:
    assert isinstance(pipe, DiffusionPipeline) and kvinv_pl.KVInversionPipeline is KVInversionPipeline
    assert set(pipe.components) == {"vae", "text_encoder", "tokenizer", "unet", "scheduler"}
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)


def test_it_is_the_tuning_and_the_edit_of_the_trainer(
    pipe: KVInversionPipeline, folder: Path, tuned: RunStore
) -> None:
    assert fits.tensors(RunStore(folder)) == fits.tensors(tuned)
    (edited,) = fits.edit(tuned, negative="a dog", guidance=3.0, start=0.4)
    images = pipe(TARGET, negative_prompt="a dog", guidance_scale=3.0, start=0.4).images
    assert [found.tobytes() for found in images] == [edited.tobytes()]


def test_inverting_first_and_then_tuning_is_the_same(
    pipe: KVInversionPipeline, image: Path, folder: Path, tmp_path: Path
) -> None:
    pipe.invert(image, SOURCE, out=tmp_path / "run")
    assert not RunStore(tmp_path / "run").done()
    with pytest.raises(UserError, match="is not tuned to the end"):
        pipe(TARGET)
    with pytest.raises(UserError, match="the picture is not tuned to the end"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.tune()
    assert fits.tensors(RunStore(tmp_path / "run")) == fits.tensors(RunStore(folder))


def test_the_parts_of_another_pipeline_make_one_in_the_dtype_that_is_asked_for() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers, on the tiny checkpoint
        other = StableDiffusionPipeline.from_pretrained(fits.checkpoint(), safety_checker=None)
    pipe = KVInversionPipeline.from_pipe(other, dtype=torch.bfloat16, steps=7)
    assert pipe.dtype == pipe.unet.dtype == torch.bfloat16 and other.unet.dtype == torch.float32
    ours, theirs = pipe.unet.state_dict(), other.unet.state_dict()
    assert all(torch.equal(ours[name], value.bfloat16()) for name, value in theirs.items())
    assert pipe._module is not None and pipe._module.steps == 7


def test_where_the_model_is_and_in_which_type_is_said_as_diffusers_says_it(tmp_path: Path) -> None:
    shutil.copytree(fits.checkpoint(), tmp_path / "half")
    for file in (tmp_path / "half").rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    half = quiet(tmp_path / "half", variant="fp16", torch_dtype=torch.bfloat16, device_map="cpu")
    assert half.dtype == half.unet.dtype == torch.bfloat16 and half.device == torch.device("cpu")
    assert half.to("cpu", torch.bfloat16) is half and half.to(torch.bfloat16) is half


def test_an_offloaded_model_is_on_the_accelerator_while_a_stage_runs_and_then_on_the_cpu(
    pipe: KVInversionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, moved, before = pipe._module, list[str](), pipe(TARGET).images[0]
    assert module is not None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: moved.append("cleared"))
    monkeypatch.setattr(module, "to", lambda place: moved.append(str(place)))
    pipe.enable_model_cpu_offload()
    assert pipe.device == torch.device("cuda") and moved == ["cpu"]
    with pipe._stage():  # which a trainer begins by moving the module to pipe.device
        moved.append("stage")
    assert moved == ["cpu", "stage", "cpu", "cleared"]
    monkeypatch.undo()
    assert pipe.to("cpu")(TARGET).images[0] == before


def test_several_prompts_give_as_many_pictures_in_the_type_that_is_asked_for(
    pipe: KVInversionPipeline,
) -> None:
    prompts = [TARGET, "a dog", TARGET]
    pictures = pipe(prompts).images
    assert [picture.size for picture in pictures] == [(45, 30)] * 3 and pictures[0] == pictures[2]
    (arrays,) = pipe(prompts, output_type="np", return_dict=False)
    assert np.array_equal((arrays * 255).round()[1], np.asarray(pictures[1]))
    tensors: Any = pipe(prompts, output_type="pt").images
    assert tensors.shape == (3, 3, 30, 45)


def test_a_callback_sees_every_step_and_may_change_the_latents_which_the_edits_record_tells(
    pipe: KVInversionPipeline,
) -> None:
    seen = list[tuple[int, int]]()

    def watch(of: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        assert of is pipe and tensors["latents"].shape[0] == 1
        seen.append((i, t))
        return tensors

    plain = pipe(TARGET).images[0]
    assert pipe(TARGET, callback_on_step_end=watch).images[0] == plain
    assert [i for i, _ in seen] == [0, 1, 2] and seen[0][1] > seen[-1][1]
    assert pipe._run is not None
    store = RunStore(pipe._run.folder)
    before = len(store.edits())
    other = pipe(TARGET, callback_on_step_end=lambda of, i, t, tensors: {"latents": tensors["latents"] * 0.9})
    assert other.images[0] != plain and pipe(TARGET).images[0] == plain
    records = [record for record, _ in store.edits()]
    assert len(records) == before + 1
    assert [record.get("steps_changed_by_a_callback") for record in records].count([0, 1, 2]) == 1


def test_the_bar_is_the_one_of_diffusers(pipe: KVInversionPipeline) -> None:
    pipe.set_progress_bar_config(file=(said := io.StringIO()))
    pipe(TARGET)
    pipe.set_progress_bar_config(disable=True)
    assert "editing" in said.getvalue() and "3/3" in said.getvalue()


def test_a_tuned_picture_is_saved_and_opened_without_its_tuning(
    pipe: KVInversionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = pipe(TARGET).images[0]
    pipe.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob(".*"))
    with pytest.raises(UserError, match="expected an empty or new folder"):
        pipe.save_pretrained(tmp_path / "saved")
    replace = os.replace

    def as_on_windows(source: Path, target: Path) -> None:
        if target.is_dir():
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", as_on_windows)
    (tmp_path / "empty").mkdir()
    pipe.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / "run.json").is_file()
    opened = quiet(tmp_path / "saved")
    assert opened(TARGET).images[0] == edited
    assert opened(TARGET, guidance_scale=4.0).images[0] != edited


def test_what_is_not_to_be_had_is_told_in_one_line(pipe: KVInversionPipeline, tmp_path: Path) -> None:
    for call, line in {
        lambda: pipe.to("cuda:1"): "device: expected cpu, cuda, mps, got cuda:1: tuning takes gradients",
        lambda: cast(Any, pipe).to(
            torch.float16
        ): "dtype: already loaded in torch.float32: pass dtype=torch.float16 to from_pretrained",
        lambda: pipe(TARGET, generator=1): "edit has no setting generator: nothing in an edit is random",
        lambda: pipe(TARGET, output_type="latent"): "output_type: expected pil, np or pt, got 'latent'",  # pyright: ignore[reportArgumentType]
        lambda: pipe(
            TARGET,
            callback_on_step_end=lambda *of: {},
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        ): "callback_on_step_end_tensor_inputs: expected latents, got 'prompt_embeds'",
        lambda: pipe.tune(prompt=SOURCE): "expected an image with its prompt",
        pipe.enable_sequential_cpu_offload: "one device: take enable_model_cpu_offload",
        lambda: pipe.enable_model_cpu_offload(device="cpu"): "expected the first accelerator, got cpu",
        lambda: quiet(
            fits.checkpoint(), device_map="balanced"
        ): "device_map: expected cpu, cuda, mps, got bal",
        lambda: quiet(
            fits.checkpoint(), torch_dtype=torch.float64
        ): "dtype: expected float32, bfloat16 or float16, got torch.float64",
        lambda: quiet(
            fits.checkpoint(), torch_dtype=torch.float32, dtype=torch.float32
        ): "dtype: got both dtype and torch_dtype",
        pipe.enable_attention_slicing: "enable_attention_slicing: the attentions are those that psi",
        pipe.enable_xformers_memory_efficient_attention: "attention: the attentions are those that psi",
        pipe.enable_group_offload: "one device: take enable_model_cpu_offload",
        lambda: pipe(
            TARGET, num_inference_steps=20
        ): "edit has no setting num_inference_steps: its steps are those of the tuning",
        lambda: pipe(TARGET, num_images_per_prompt=2): "edit has no setting num_images_per_prompt",
        lambda: quiet(fits.checkpoint(), use_safetensors=True): "load has no setting use_safetensors",
        lambda: quiet(fits.checkpoint())(TARGET): "no picture is tuned: call",
        lambda: pipe.save_pretrained(
            tmp_path, variant="fp16"
        ): "takes only a folder, got the argument variant as well",
    }.items():
        with pytest.raises(UserError) as caught:
            call()
        assert line in str(caught.value) and "\n" not in str(caught.value)
    assert pipe.to("cpu") is pipe and pipe(TARGET)
