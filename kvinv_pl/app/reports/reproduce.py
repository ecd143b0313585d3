"""How to reproduce a run or an edit: settings as the command line takes them, and the commands."""

import inspect
import shlex
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from kvinv_pl.data.source_image import tuned_with
from kvinv_pl.stages.settings import EditSettings

SHORT = {"guidance", "start", "reading", "negative"}
"""Options of an edit that have a short flag."""


def reproducing_settings(run: Mapping[str, Any], edit: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration that makes a tuned run again, as `kvinv run --config` takes it.

    The target and settings of `edit`, the record of one of its edits, take the place of the run's own.
    """
    tuning = run["tuning"]
    editing = dict(run["editing"])
    precision = editing.pop("precision", None)
    if edit is not None:
        editing |= full_settings(edit, editing)
    settings = {
        **tuned_with(run), "inversion_guidance": run["inversion"]["guidance"],
        "tuning_guidance": tuning["guidance"],
        **({"optimizer": _optimizer(tuning["optimizer"])} if tuning["optimizer"] else {}),
        "curriculum": tuning["curriculum"],
        **{name: tuning[name] for name in ("inner_steps", "settle_steps") if tuning[name]},
        "tolerance": tuning["tolerance"][0], "tolerance_growth": tuning["tolerance"][1],
        **{name: tuning[name] for name in ("carry", "kv", "seed", "store_dtype")},
        **_reconstruction_settings(run.get("reconstruction")), **editing,
    }  # fmt: skip
    targets = [edit["target"]] if edit is not None else run.get("targets", [])
    data = {"source": run["source"], "targets": targets, "geometry": run["picture"]["mode"]}
    return {
        "model": settings, "data": data, **({"trainer": {"precision": precision}} if precision else {})
    }  # fmt: skip


def as_yaml(settings: Mapping[str, Any], command: str) -> str:
    """The text of a configuration file, which begins with the command that takes it."""
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=100)
    return "".join(f"# {line}\n" for line in command.splitlines()) + text


def run_command(run: Mapping[str, Any], config: str = "settings.yaml") -> str:
    """The command that makes the run again from its picture and its settings."""
    mask = ["--mask", "mask.png"] if run["picture"]["mask"] else []
    size = f"--data.size={min(run['picture']['model_size'])}"  # no setting: those serve edits as well
    image = ["--image", run["picture"]["name"], *mask, size]
    words = ["kvinv", "run", "--config", config, *image, "--out", "again"]
    return shlex.join(words)


def edit_command(folder: Path | str, run: Mapping[str, Any], edit: Mapping[str, Any]) -> str:
    """The command that makes an edit of a tuned run again: its target, and what is not as the run has it."""
    tuned = {"kv": run["tuning"]["kv"], **run["editing"]}
    words = ["kvinv", "edit", "--run", str(folder), "--target", edit["target"]]
    idle = {setting.name: setting.metadata.get("idle") for setting in fields(EditSettings)}
    for name, value in full_settings(edit, tuned).items():
        if value != tuned.get(name, idle[name]):
            words.append(f"--{name if name in SHORT else f'model.{name}'}={value}")
    return shlex.join(words)


def full_settings(edit: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that an edit was made with, of which its record leaves out those that did nothing.

    `tuned` are the run's, for what neither the record nor the setting itself says.
    """
    otherwise = {
        setting.name: setting.metadata["idle"] if "idle" in setting.metadata else tuned.get(setting.name)
        for setting in fields(EditSettings)
    }
    return {name: edit.get(name, value) for name, value in otherwise.items()}


def _reconstruction_settings(reconstruction: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the reconstruction had to reach, and how often it might be tried again.

    A record of an older version has no such number. Where the picture did not pass, it was tried as often as
    it might be; where it passed, no more is known than how often it took.
    """
    if reconstruction is None:
        return {}
    tried = len(reconstruction["attempts"]) - 1
    known = "retries" in reconstruction or tried or not reconstruction["passed"]
    return {
        "required_psnr": reconstruction["psnr_demanded"],
        **({"retries": reconstruction.get("retries", tried)} if known else {}),
    }


def _optimizer(record: Mapping[str, Any]) -> dict[str, Any]:
    """The class of an optimiser, with the arguments that are not its defaults."""
    given = dict(record)
    module, _, name = given.pop("class_path").rpartition(".")
    parameters = inspect.signature(getattr(import_module(module), name)).parameters
    plain = {
        key: list(p.default) if isinstance(p.default, tuple) else p.default for key, p in parameters.items()
    }
    init_args = {key: value for key, value in given.items() if key in plain and value != plain[key]}
    return {"class_path": f"{module}.{name}", **({"init_args": init_args} if init_args else {})}
