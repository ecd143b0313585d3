"""The fields of run.json: all that the files of a run depend on, and the figures measured."""

import json
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from kvinv_pl.data.images.geometry import Geometry
from kvinv_pl.data.images.pictures import Picture

INVERTED = ("model", "scheduler", "picture", "source", "inversion")
"""The fields that a trajectory depends on; psi depends on these and on "tuning"."""
GIVEN = {
    "scheduler.prediction": "prediction_type",
    "inversion.guidance": "inversion_guidance",
    "tuning.guidance": "tuning_guidance",
    "tuning.tolerance.0": "tolerance",
    "tuning.tolerance.1": "tolerance_growth",
    "picture.mode": "geometry",
}
"""Where an option is recorded by another name than its own."""
MADE_OF = {
    "scheduler.timesteps": "timestep_spacing",
    "scheduler.alphas": "checkpoint",
    "model.class": "checkpoint",
    "model.sha256": "checkpoint",
    "model.changed_in_memory": "checkpoint",
    "tuning.sites": "target_modules",
    "picture.box": "geometry",
    "picture.model_size": "size",
    "picture.mask": "mask",
    **dict.fromkeys(("picture.name", "picture.sha256", "picture.notes", "picture.size"), "image"),
}
"""Where what is recorded is no option's value, and the option that it comes from."""
LAST = ("sha256", "timesteps", "alphas", "sites", "model_size", "box")
"""What differs along with something that says more."""
LIBRARIES = ("kvinv-pl", "torch", "lightning", "diffusers", "transformers", "peft")


def of_picture(
    name: str, picture: Picture, geometry: Geometry, mode: str, mask: str | None
) -> dict[str, Any]:
    """The record of a picture: its name, how it was read and resized, and digests of its pixels."""
    return {
        "name": name,
        "sha256": picture.sha256,
        "notes": picture.notes,
        "mode": mode,
        "size": list(geometry.original),
        "model_size": list(geometry.resized),
        "box": list(geometry.box) if geometry.box else None,
        "mask": mask,
    }


def geometry_of(record: dict[str, Any]) -> Geometry:
    """The geometry from the record that `of_picture` made."""
    box = record["box"]
    return Geometry(tuple(record["size"]), tuple(record["model_size"]), tuple(box) if box else None)


def of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's class and its arguments."""
    from kvinv_pl.attention.config import class_path  # with diffusers, which reading a record does not need

    given = {key: value for key, value in sorted(optimizer.defaults.items()) if not isinstance(value, Tensor)}
    plain = json.loads(json.dumps(given, default=str))
    return {"class_path": class_path(type(optimizer)), **plain}


@cache  # version reads the whole metadata of a package
def versions() -> dict[str, str]:
    """The libraries whose behaviour a run may depend on."""
    return {name: version(name) for name in LIBRARIES}


MISSING = ...  # which no JSON has


def difference(field: str, found: Any, expected: Any) -> tuple[str, str, str] | None:
    """The first leaf in which two JSON values differ: its field and both values, cut to a readable length."""
    if found == expected:
        return None
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        found, expected = dict(enumerate(found)), dict(enumerate(expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [*found, *(key for key in expected if key not in found)]
        for key in sorted(keys, key=lambda key: key in LAST):
            if leaf := difference(f"{field}.{key}", found.get(key, MISSING), expected.get(key, MISSING)):
                return leaf
    shown = ["nothing" if value in (None, MISSING) else repr(value) for value in (found, expected)]
    found, expected = (text if len(text) <= 120 else f"{text[:117]}..." for text in shown)
    return field, found, expected


def told_apart(field: str, found: Any, expected: Any) -> str | None:
    """The first difference of two values of a field, by the option that it comes from; None if there is none.

    As "steps = 2, not 3", or where the record has what was made of an option, as "another
    timestep_spacing (timesteps.0 = 999, not 981)".
    """
    if (leaf := difference(field, found, expected)) is None:
        return None
    path, found, expected = leaf
    section, _, inner = path.partition(".")
    name = GIVEN.get(path, inner if section in (*INVERTED, "tuning") and inner else path)
    said = f"{name.replace('.init_args.', '.').removesuffix('.class_path')} = {found}, not {expected}"
    option = next((option for place, option in MADE_OF.items() if f"{path}.".startswith(f"{place}.")), None)
    return said if option is None else f"another {option} ({said})"
