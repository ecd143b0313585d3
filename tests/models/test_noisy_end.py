"""Where the steps lie in the noise schedule: by choice, and said where few leave the noisy end out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import fits
import pytest
import torch
from checkpoints import change_json, make
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from kvinv_pl.errors import UserError
from kvinv_pl.models.input_warnings import skipped_timesteps
from kvinv_pl.models.load_options import DEFAULTS, LoadOptions, Spacing
from kvinv_pl.models.stable_diffusion import Backbone


@pytest.mark.parametrize("spacing", get_args(Spacing))
def test_a_spacing_that_is_chosen_is_that_of_diffusers(spacing: Spacing) -> None:
    chosen = Backbone.load(str(fits.checkpoint()), options=LoadOptions(timestep_spacing=spacing))
    scheduler: Any = DDIMScheduler.from_pretrained(fits.checkpoint() / "scheduler", timestep_spacing=spacing)
    scheduler.set_timesteps(7)
    assert torch.equal(chosen.step_table(7).timesteps, scheduler.timesteps)


def test_a_spacing_is_part_of_a_runs_identity_where_it_is_chosen_alone() -> None:
    assert "timestep_spacing" not in DEFAULTS.record()
    assert LoadOptions(timestep_spacing="trailing").record() == {"timestep_spacing": "trailing"}
    plain = Backbone.load(str(fits.checkpoint()))
    assert "timestep_spacing" not in plain.identity and plain.step_table(5).timesteps[0] == 801


@pytest.mark.parametrize(("steps", "share"), [(1, "100%"), (3, "33%"), (10, "10%"), (20, "5%"), (50, "")])
def test_few_steps_of_leading_spacing_are_told_what_they_leave_out(steps: int, share: str) -> None:
    backbone = Backbone.load(str(fits.checkpoint()))
    table = backbone.step_table(steps)
    line = skipped_timesteps(backbone, table)
    if not share:
        assert line is None
        return
    assert line is not None and f"the noisiest {share}" in line and "\n" not in line
    assert f"begins at timestep {table.timesteps[0]} of 999" in line and "timestep_spacing trailing" in line
    spaced = Backbone.load(str(fits.checkpoint()), options=LoadOptions(timestep_spacing="trailing"))
    assert skipped_timesteps(spaced, spaced.step_table(steps)) is None


def test_where_trailing_spacing_would_be_refused_it_is_not_advised(tmp_path: Path) -> None:
    place = make("tiny", tmp_path)
    change_json(place / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    backbone = Backbone.load(str(place))
    line = skipped_timesteps(backbone, backbone.step_table(5))
    assert line is not None and "timestep 801 of 998" in line and "trailing" not in line
    with pytest.raises(UserError, match="zero terminal SNR"):
        Backbone.load(str(place), options=LoadOptions(timestep_spacing="trailing")).step_table(5)


def test_a_spacing_that_there_is_not_is_refused_in_one_line(tmp_path: Path) -> None:
    place = make("tiny", tmp_path)
    change_json(place / "scheduler" / "scheduler_config.json", timestep_spacing="karras")
    with pytest.raises(UserError, match="timestep_spacing 'karras', expected one of leading, linspace, tr"):
        Backbone.load(str(place))
