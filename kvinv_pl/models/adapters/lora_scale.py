"""The factor alpha / rank of each layer of a LoRA, from its tensors or from its configuration."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.loading import load_json, try_read

METADATA = "lora_adapter_metadata"
"""Where diffusers writes the configurations of peft, by the model's name."""


@dataclass(frozen=True)
class Scales:
    """Configurations of peft by the model that they are for; "" is for any."""

    configs: Mapping[str, Mapping[str, Any]]

    def of(self, layer: str, rank: int, alpha: Tensor | None) -> float:
        """Alpha / rank of a layer; alpha is its own, or that of the configuration, or else the rank."""
        model, _, path = layer.partition(".")
        config = self.configs.get(model) or self.configs.get("") or {}
        if alpha is not None:
            return float(alpha) / rank
        pattern: Mapping[str, float] = config.get("alpha_pattern") or {}
        paths = (path, f"text_model.{path}")  # older text models have this part
        matches = (key for key in pattern for name in paths if re.match(rf"(.*\.)?({key})$", name))
        matched = next(matches, None)  # as peft matches
        whole = pattern[matched] if matched is not None else config.get("lora_alpha")
        if whole is None:
            return 1.0
        return float(whole) / (rank**0.5 if config.get("use_rslora") else rank)


def read_scales(path: Path, metadata: Mapping[str, str], names: Collection[str]) -> Scales:
    """From the metadata that diffusers writes, or from adapter_config.json beside a file of peft's own."""
    if METADATA in metadata:
        flat: dict[str, Any] = try_read(path, lambda: dict(json.loads(metadata[METADATA])))
        models = ("unet", "text_encoder")
        configs = {
            model: {key.removeprefix(f"{model}."): flat[key] for key in flat if key.startswith(f"{model}.")}
            for model in models
        }
    elif any(name.startswith("base_model.model.") for name in names):
        config_file = path.with_name("adapter_config.json")
        if not config_file.is_file():
            raise UserError(
                f"{path} has no adapter_config.json beside it, which says its alpha: put it there"
            )
        configs = {"": load_json(config_file)}
    else:
        configs = {}
    for config in configs.values():
        if config.get("use_dora"):
            raise UserError(f"{path} contains a DoRA, which is not supported; expected a LoRA")
    return Scales(configs)
