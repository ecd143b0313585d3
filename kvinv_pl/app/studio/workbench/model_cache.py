"""The model that is in memory: that of the pictures tuned here, or of a run that is edited. There is one."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from kvinv_pl.api import KVInverter, load, settings_to_open
from kvinv_pl.data.source_image import settings_of
from kvinv_pl.stages.settings import IDLE, EditSettings

MASKED = "masked"


class ModelCache:
    """A model, and what it may be used for without being loaded again."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Take arguments of `load`, and refuse bad ones now."""
        self._settings = settings
        inverter = load(**settings)
        self.editing = inverter.model.editing
        """What an edit of a picture that is tuned here begins with."""
        self._model: tuple[set[str], KVInverter] | None = ({"tune False"}, inverter)

    def for_tuning(self, masked: bool) -> KVInverter:
        """With the settings of this studio; with a mask, the variant that reads one."""
        key = f"tune {masked}"
        if self._model is None or key not in self._model[0]:
            self._model = None  # two at once may be too much for the memory
            settings = dict(self._settings)
            if masked and "attention" not in settings:
                settings["attention"] = MASKED
            self._model = ({key}, load(**settings))
        return self._model[1]

    def add_run(self, folder: Path) -> None:
        """The model in memory may edit this run, too."""
        if self._model is not None:
            self._model[0].add(_model_key(folder))

    def for_editing(self, folder: Path) -> KVInverter:
        """The model that a run was tuned with."""
        key = _model_key(folder)
        if self._model is None or key not in self._model[0]:
            self._model = None
            device = {name: self._settings[name] for name in ("accelerator",) if name in self._settings}
            self._model = ({key}, load(**{**settings_to_open(folder), **device}))
        return self._model[1]


def _model_key(folder: Path) -> str:
    """What a model must be to edit this run; settings of the edit itself make no difference."""
    found = settings_of(folder, IDLE)
    of_edit = {setting.name for setting in fields(EditSettings)}
    model = {name: value for name, value in found["model"].items() if name not in of_edit}
    return json.dumps([model, found.get("trainer")], sort_keys=True)
