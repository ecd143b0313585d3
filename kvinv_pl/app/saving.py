"""A tuned picture as a folder of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kvinv_pl.data.files import TEMPORARY, explaining_os_errors
from kvinv_pl.data.run_store import RunStore
from kvinv_pl.errors import UserError


def save_run(run: Path, target: Path) -> None:
    """Copy a tuned run to a folder that is new or empty, whole or not at all."""
    if "reconstruction" not in RunStore(run).read_run():
        raise UserError("save_pretrained: the picture is not tuned to the end: call tune() first")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"save_directory: expected a new folder, got {target}, in which there is something")
    passing = shutil.ignore_patterns(".lock*", "logs", f"*{TEMPORARY}")
    beside = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY}")
    with explaining_os_errors("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copytree(run, beside, ignore=passing)
            if target.exists():  # which Windows would not replace, empty as it is
                target.rmdir()
            os.replace(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
