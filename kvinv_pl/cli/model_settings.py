"""The section model of a configuration file, for commands that are no stage."""

from __future__ import annotations

from argparse import ArgumentError
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from kvinv_pl.cli.variant_names import make_importable, name_variants_in_yaml
from kvinv_pl.data.files import explaining_os_errors
from kvinv_pl.errors import UserError
from kvinv_pl.training.module import KVInversion


def read_model_settings(file: Path) -> dict[str, Any]:
    """What a file says of the model, as `kvinv_pl.load` takes it; variants and optimisers are made."""
    make_importable([str(file)])
    with explaining_os_errors("read", file):
        text = file.read_text(encoding="utf-8")
    parser: Any = ArgumentParser(exit_on_error=False, parser_mode=name_variants_in_yaml())
    parser.add_class_arguments(KVInversion, "model", instantiate=False)
    try:
        found = yaml.safe_load(text)
        if not isinstance(found, dict) or "model" not in found:
            raise UserError(f"{file}: expected a section model, as the stages read it, got none")
        section = yaml.safe_dump({"model": found["model"]})
        read = parser.instantiate(parser.parse_string(section)).model
    except (ArgumentError, yaml.YAMLError) as error:
        first = " ".join(str(error).split())
        raise UserError(f"{file}: {first}") from error
    return {name: getattr(read, name) for name in found["model"]}
