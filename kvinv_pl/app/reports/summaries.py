"""Summaries of a run and its edits as sentences."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kvinv_pl.data.runs.edits import search_of
from kvinv_pl.stages.settings import EditSettings


def certificate(run: Mapping[str, Any]) -> list[str]:
    """How well the tuned model gives the picture back, sentence by sentence."""
    found = run.get("reconstruction")
    if found is None:
        return ["The picture is not tuned to the end yet; the same command goes on with it."]
    reached, demanded = found["psnr_to_round_trip"], found["psnr_demanded"]
    verdict = (
        "it passed."
        if found["passed"]
        else "it did not pass, so expect edits to lose some of the picture. More inner steps may help."
    )
    sentences = [
        f"With its own words, the tuned model gives the picture back at {reached:.1f} dB of what the VAE "
        f"alone makes of it; {demanded:g} dB were asked for: {verdict}",
        f"To the picture itself that is {found['psnr_to_source']:.1f} dB, of the "
        f"{found['psnr_of_round_trip_to_source']:.1f} dB that the VAE's own round trip leaves.",
        f"It took {found['inner_steps']} inner steps over {len(found['phases'])} timesteps.",
    ]
    if len(found["attempts"]) > 1:
        each = ", ".join(f"{attempt['psnr_to_round_trip']:.1f}" for attempt in found["attempts"])
        sentences.append(f"It was tuned {len(found['attempts'])} times, at {each} dB; the best is kept.")
    return sentences


def settings_of_edit(record: Mapping[str, Any]) -> dict[str, str]:
    """The settings of an edit that its record has, ready to show."""
    names = [setting.name for setting in fields(EditSettings) if record.get(setting.name) not in (None, "")]
    return {name.replace("_", " "): format_setting(record[name]) for name in names}


def search_summary(record: Mapping[str, Any]) -> str:
    """What a search thought of an edit; empty where there was none."""
    if not (found := search_of(record)):
        return ""
    judge = f"the CLIP {found['judge']}" if found["judge"] else "the model itself"
    return f"agreement {found['agreement']:.3g}, likeness {found['likeness']:.3g}, by {judge}"


def format_setting(value: Any) -> str:
    """A setting for display."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(format_setting, value))
    if isinstance(value, Mapping):
        rest = {key: item for key, item in value.items() if key != "class_path"}
        name = str(value.get("class_path", "")).rpartition(".")[2]
        shown = ", ".join(
            f"{key} {format_setting(item)}" for key, item in rest.get("init_args", rest).items()
        )
        return f"{name} ({shown})" if name and shown else name or shown
    return "-" if value is None else str(value)
