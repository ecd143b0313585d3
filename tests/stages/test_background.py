"""An edit that keeps the source's background."""

from pathlib import Path

import fits
import pytest
import torch
from torch import Tensor

from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.stages.editing.background import blend_background, source_subject
from kvinv_pl.training.datamodule import SourceImages


def latents() -> tuple[Tensor, Tensor]:
    z, source = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return z, source[:1]


def test_away_from_both_subjects_the_latents_are_the_sources_and_on_them_the_edits() -> None:
    z, source = latents()
    in_source = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    in_source[..., 1, 1] = True
    in_edit = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    in_edit[:, :, 6, 6] = 2.0
    out = blend_background(z, source, in_source, in_edit)
    edits = torch.zeros(8, 8, dtype=torch.bool)
    edits[0:3, 0:3] = edits[5:8, 5:8] = True  # a token's margin around each
    assert torch.equal(out[..., edits], z[..., edits])
    assert torch.equal(out[..., ~edits], source.expand_as(z)[..., ~edits])


def test_each_edit_has_its_subject_where_its_own_map_says() -> None:
    z, source = latents()
    in_source = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    in_source[..., 0, 0] = True
    in_edit = torch.zeros(3, 1, 8, 8)
    for n in range(3):
        in_edit[n, 0, 2 * n + 2, 6] = 1.0
    out = blend_background(z, source, in_source, in_edit)
    for n in range(3):
        assert torch.equal(out[n, :, 2 * n + 2, 6], z[n, :, 2 * n + 2, 6])
    assert torch.equal(out[0, :, 6, 6], source[0, :, 6, 6])


def test_a_subject_smaller_than_a_token_still_has_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fits.fit(fits.picture(tmp_path / "cat.png"), tmp_path / "run", steps=1, inner_steps=1)
    module = fits.model(steps=1)
    module.load_backbone(torch.float32)
    mask = torch.zeros(64, 64)
    mask[0, 0] = 1.0
    monkeypatch.setattr("kvinv_pl.stages.editing.background.mask_of", lambda store: mask)
    found = source_subject(module.denoiser, store, fits.SOURCE, "cat")
    assert found.sum() == 1 and found[0, 0, 0, 0]


def test_a_subject_that_the_source_does_not_name_is_refused_before_anything_is_tuned(tmp_path: Path) -> None:
    picture, out = fits.picture(tmp_path / "cat.png"), tmp_path / "run"
    data = SourceImages(str(picture), "an animal standing", [fits.TARGET], out=str(out))
    with pytest.raises(UserError, match="'cat' is not in the prompt 'an animal standing'"):
        fits.trainer().run(fits.model(background="kept", subject="cat"), data)
    assert not RunStore(out).done()
