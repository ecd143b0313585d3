"""The fields of run.json: all that the files of a run depend on, and the figures measured."""

import json
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from kvinv_pl.data.images.geometry import Geometry
from kvinv_pl.data.images.pictures import Picture

TRAJECTORY_FIELDS = ("model", "scheduler", "picture", "source", "inversion")
"""The fields that a trajectory depends on; psi depends on these and on "tuning"."""
OPTION_OF_FIELD = {
    "scheduler.prediction": "prediction_type",
    "inversion.guidance": "inversion_guidance",
    "tuning.guidance": "tuning_guidance",
    "tuning.tolerance.0": "tolerance",
    "tuning.tolerance.1": "tolerance_growth",
    "picture.mode": "geometry",
}
"""The options that are recorded by another name than their own."""
DERIVED_FROM = {
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
"""The fields that are no option's value, and the option that each follows from."""
COMPARED_LAST = ("sha256", "timesteps", "alphas", "sites", "model_size", "box")
"""Fields that differ only along with others, which say more."""
LIBRARIES = ("kvinv-pl", "torch", "lightning", "diffusers", "transformers", "peft")


def picture_record(
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
    """The geometry from the record that `picture_record` made."""
    box = record["box"]
    return Geometry(tuple(record["size"]), tuple(record["model_size"]), tuple(box) if box else None)


def optimizer_record(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's class and its arguments."""
    from kvinv_pl.attention.config import class_path  # with diffusers, which reading a record does not need

    defaults = {key: value for key, value in sorted(optimizer.defaults.items()) if not torch.is_tensor(value)}
    return {"class_path": class_path(type(optimizer)), **json.loads(json.dumps(defaults, default=str))}


@cache  # version reads the whole metadata of a package
def versions() -> dict[str, str]:
    """The libraries whose behaviour a run may depend on."""
    return {name: version(name) for name in LIBRARIES}


MISSING = ...  # which no JSON has


def first_difference(field: str, recorded: Any, expected: Any) -> str | None:
    """The first difference of two values of a field, by the option that it comes from; None if there is none.

    As "steps = 2, not 3", or where the record has what follows from an option, as "another
    timestep_spacing (timesteps.0 = 999, not 981)".
    """
    if (leaf := _differing_leaf(field, recorded, expected)) is None:
        return None
    path, *values = leaf
    section, _, inner = path.partition(".")
    name = OPTION_OF_FIELD.get(path, inner if section in (*TRAJECTORY_FIELDS, "tuning") and inner else path)
    texts = ["nothing" if value in (None, MISSING) else repr(value) for value in values]
    was, wanted = (text if len(text) <= 120 else f"{text[:117]}..." for text in texts)
    message = f"{name.replace('.init_args.', '.').removesuffix('.class_path')} = {was}, not {wanted}"
    option = next((DERIVED_FROM[key] for key in DERIVED_FROM if f"{path}.".startswith(f"{key}.")), None)
    return message if option is None else f"another {option} ({message})"


def _differing_leaf(path: str, recorded: Any, expected: Any) -> tuple[str, Any, Any] | None:
    """The first leaf in which two JSON values differ: its path and both values."""
    if recorded == expected:
        return None
    if isinstance(recorded, list) and isinstance(expected, list) and len(recorded) == len(expected):
        recorded, expected = dict(enumerate(recorded)), dict(enumerate(expected))
    if isinstance(recorded, dict) and isinstance(expected, dict):
        for key in sorted({**recorded, **expected}, key=lambda key: key in COMPARED_LAST):
            pair = recorded.get(key, MISSING), expected.get(key, MISSING)
            if leaf := _differing_leaf(f"{path}.{key}", *pair):
                return leaf
    return path, recorded, expected
