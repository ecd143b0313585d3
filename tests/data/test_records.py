import json
import math
import re
from collections.abc import Iterator
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import fits
import pytest
import torch
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]

from kvinv_pl.algorithm.ddim import StepTable
from kvinv_pl.attention import Site
from kvinv_pl.attention.config import variant_config
from kvinv_pl.data.images.geometry import fit_geometry, psnr
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.runs.records import (
    TRAJECTORY_FIELDS,
    first_difference,
    geometry_of,
    optimizer_record,
    picture_record,
)
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.module import KVInversion


def test_psnr_counts_pixels_from_minus_one_to_one() -> None:
    zeros = torch.zeros(3, 8, 8)
    assert psnr(zeros, zeros + 2) == pytest.approx(0)
    assert psnr(zeros, zeros + 0.2) == pytest.approx(20, abs=1e-4)
    assert psnr(zeros, zeros) == 100
    assert math.isfinite(psnr(zeros, zeros + 1e-9))


@pytest.mark.parametrize("mode", ["keep", "crop"])
def test_a_geometry_comes_back_from_json_as_it_was(mode: Literal["keep", "crop"], tmp_path: Path) -> None:
    opened = open_picture(fits.picture(tmp_path / "cat.png", (37, 23)))
    geometry = fit_geometry(opened.image.size, (16, 16), 4, mode)
    record = json.loads(json.dumps(picture_record("cat.png", opened, geometry, mode, None)))
    assert geometry_of(record) == geometry


TUNED = Path(__file__).parent / "run_format_1" / "tuned" / "run.json"


def leaves(value: Any, *path: str | int) -> Iterator[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from leaves(each, *path, key)
    if not isinstance(value, dict | list):
        yield path


def test_whatever_a_run_was_made_with_is_told_by_an_option_that_a_user_gives() -> None:
    options = {*signature(KVInversion).parameters, *signature(SourceImages).parameters}
    record, count = json.loads(TUNED.read_text()), 0
    for section in (*TRAJECTORY_FIELDS, "tuning"):
        for path in leaves(record[section]):
            other = json.loads(TUNED.read_text())
            place: Any = other
            for key in (section, *path)[:-1]:
                place = place[key]
            place[(section, *path)[-1]] = "other"
            said = first_difference(section, record[section], other[section])
            found = re.match(r"(?:another )?(\w+)", str(said))
            assert found and found[1] in options, said
            count += 1
    assert count > 40 and first_difference("tuning", record["tuning"], record["tuning"]) is None


@pytest.mark.parametrize(
    ("field", "found", "expected", "said"),
    [
        ("scheduler", {"timesteps": [1], "steps": 2}, {"timesteps": [2], "steps": 3}, "steps = 2, not 3"),
        ("scheduler", {"alphas": [0.9]}, {"alphas": [0.8]}, "another checkpoint (alphas.0 = 0.9, not 0.8)"),
        ("tuning", {"tolerance": [1, 2]}, {"tolerance": [1, 3]}, "tolerance_growth = 2, not 3"),
        ("tuning", {"max_grid": None}, {"max_grid": 4}, "max_grid = nothing, not 4"),
        ("model", {}, {"loras": ["a"]}, "loras = nothing, not ['a']"),
        ("source", "a cat", "a dog", "source = 'a cat', not 'a dog'"),
    ],
)  # fmt: skip
def test_a_difference_is_told_by_the_first_that_says_something(
    field: str, found: Any, expected: Any, said: str
) -> None:
    assert first_difference(field, found, expected) == said


def test_a_table_is_written_down_step_by_step_without_loss() -> None:
    table = StepTable(
        torch.tensor([501, 1]), torch.tensor([0.1, 0.7, 0.9991234567890123], dtype=torch.float64), True
    )
    record = json.loads(json.dumps(table.record()))
    assert record["prediction"] == "v_prediction" and record["steps"] == 2
    assert record["timesteps"] == [501, 1]
    assert torch.equal(torch.tensor(record["alphas"], dtype=torch.float64), table.alphas)


def test_a_variant_is_written_down_as_a_configuration_names_it() -> None:
    cp = partial(FullKV, start="noise", noise_std=0.5)(Site("up_blocks.0", 1, (2, 2), 8, 2))
    record = json.loads(json.dumps(variant_config(cp)))
    assert record["class_path"] == "kvinv_plugins.full_kv.FullKV"
    assert record["init_args"] == {"start": "noise", "noise_std": 0.5, "scale": "layer"}


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.LBFGS])
def test_optimisers_that_differ_in_a_setting_differ_in_their_record(
    kind: type[torch.optim.Optimizer],
) -> None:
    def record(lr: float) -> dict[str, object]:
        made = kind([torch.nn.Parameter(torch.zeros(1))], lr=lr)  # pyright: ignore[reportCallIssue]
        return json.loads(json.dumps(optimizer_record(made)))

    assert str(record(0.1)["class_path"]).endswith(f".{kind.__name__}")
    assert record(0.1) == record(0.1) != record(0.2)
