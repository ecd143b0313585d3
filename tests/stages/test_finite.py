"""What is not finite is never written, and never gone on with; whatever is beside it comes out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from commands import kvinv, refused
from fits import SOURCE, TARGET
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from kvinv_pl.data.runs import files
from kvinv_pl.data.runs.layout import Header
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import SomeFailedError, UserError
from kvinv_pl.stages.editing import edit
from kvinv_pl.training.datamodule import SourceImages

WEIGHTS = {
    "unet": ("diffusion_pytorch_model", "conv_out.bias"),
    "vae": ("diffusion_pytorch_model", "quant_conv.bias"),
    "text_encoder": ("model", "final_layer_norm.bias"),
}


def damaged(part: str, folder: Path) -> str:
    """The tiny checkpoint with a weight of this part that is no number."""
    shutil.copytree(fits.checkpoint(), folder)
    stem, name = WEIGHTS[part]
    file = folder / part / f"{stem}.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if f".{key}".endswith(f".{name}"))
    save_file({**tensors, key: torch.full_like(tensors[key], torch.nan)}, file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("vae", "what the VAE makes of the picture"),
        ("text_encoder", "what the text model makes of a prompt"),
        ("unet", r"what the model makes of cat\.png at timestep 1 of the inversion"),
    ],
)
def test_a_checkpoint_that_gives_no_numbers_is_named_and_leaves_no_run(
    part: str, what: str, tmp_path: Path
) -> None:
    checkpoint = damaged(part, tmp_path / "broken")
    with pytest.raises(UserError, match=f"{what} is not finite: the weights of this checkpoint are damaged"):
        fits.fit(fits.picture(tmp_path / "cat.png"), tmp_path / "run", checkpoint=checkpoint)
    assert not (tmp_path / "run").exists()


def test_in_half_precision_full_precision_is_advised_and_at_a_guidance_a_lower_one(tmp_path: Path) -> None:
    model = fits.model(checkpoint=damaged("unet", tmp_path / "broken"), inversion_guidance=7.5)
    data = SourceImages(str(fits.picture(tmp_path / "cat.png")), SOURCE, out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="use a lower inversion_guidance, or use precision 32-true"):
        fits.trainer(precision="bf16-mixed").invert(model, data)


def test_a_mask_is_not_read_from_attention_that_is_no_number(tmp_path: Path) -> None:
    checkpoint, picture = damaged("text_encoder", tmp_path / "broken"), fits.picture(tmp_path / "cat.png")
    answer = kvinv(
        "mask", picture, "--word", "cat", "--source", SOURCE, "--checkpoint", checkpoint,
        "--out", tmp_path / "mask.png",
    )  # fmt: skip
    refused(answer, "not finite", "damaged")
    assert not (tmp_path / "mask.png").exists()


def test_a_trajectory_of_an_older_version_that_is_not_finite_is_made_again(
    image: Path, tmp_path: Path
) -> None:
    store = fits.finished(tmp_path / "run")
    whole = fits.tensors(store)
    z = store.trajectory()
    z[2:] = torch.nan
    data = save({"z": z}, {"format": "1", "kind": "trajectory", "info": "{}"})
    head = Header.of(data)
    files.write_atomically(
        store.folder / "trajectory.safetensors", head.signed(head.digest(data[head.end :])), data[head.end :]
    )
    shutil.rmtree(store.folder / "steps")
    assert not store.has_trajectory()
    assert fits.tensors(fits.fit(image, tmp_path / "run")) == whole


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_psi_k_bar_v_bar_or_z_is_written_that_is_not_finite(
    dtype: str, value: float, tmp_path: Path
) -> None:
    good, bad = torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)
    bad[0, 1, 2] = value
    store = RunStore(tmp_path / "run")
    for psi, z, kv in ((bad, good, good), (good, bad, good), (good, good, bad)):
        with pytest.raises(UserError, match="is not finite; use a lower learning rate"):
            store.save_step(0, {"up.k_hat": psi}, z, {"up": (kv, good)}, {}, dtype)
    with pytest.raises(UserError, match="is not finite"):
        store.save_pivot(0, {"up.k_hat": bad}, {}, dtype)
    with pytest.raises(UserError, match="is not finite"):
        store.save_trajectory(bad[None])
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


class Huge(FullKV):
    """Has a number that half precision cannot hold, in the slot of the picture with the larger K."""

    def __init__(self, site: Any) -> None:
        super().__init__(site)
        self.observes = True
        self.register_buffer("size", torch.zeros(site.slots, 1, 1))

    def reset(self, generator: torch.Generator | None = None) -> None:
        super().reset(generator)
        for buffer in self.buffers():  # none yet in the base's __init__
            buffer.zero_()

    def observe(self, k: Tensor, v: Tensor) -> None:
        self.size[k.square().sum((1, 2)).argmax()] = 1e6


def test_psi_that_the_store_cannot_hold_fails_its_own_picture_alone(tmp_path: Path) -> None:
    fits.pictures(tmp_path / "in", "01")
    data = SourceImages(str(tmp_path / "in"), SOURCE, out=str(tmp_path / "out"))
    model = fits.model(attention=Huge, slots=2, store_dtype="float16", target_modules="middle")
    with pytest.raises(SomeFailedError) as raised:
        fits.trainer().fit(model, datamodule=data)
    (reason,) = raised.value.reasons.values()
    assert "attn1.size: expected values within 65504, the most that store_dtype float16 can hold" in reason
    assert sorted(len(image.store.done()) for image in data.images) == [0, 3]


def test_an_edit_that_is_not_finite_is_named_and_those_beside_it_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, render = fits.finished(tmp_path / "run"), edit.edit

    def of_which_the_first_runs_away(*args: Any) -> Tensor:
        z_0 = render(*args)
        z_0[0] = torch.inf
        return z_0

    monkeypatch.setattr(edit, "edit", of_which_the_first_runs_away)
    for targets in ([TARGET, "a dog"], [TARGET]):
        with pytest.raises(UserError, match=f"the edit to '{TARGET}' is not finite: use a lower guidance"):
            fits.edit(store, *targets)
    assert [record["target"] for record, _ in store.edits()] == ["a dog"]
