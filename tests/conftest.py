"""What holds for every test: no network, one thread, and shapes in signatures are checked."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

# before anything imports the libraries that read them; the processes that tests start inherit them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)

# without cli and training: jsonargparse reads the signatures there, which stay as they are written
PACKAGE = Path(__file__).parents[1] / "kvinv_pl"
FOLDERS = ("algorithm", "attention", "bench", "data", "menagerie", "models", "stages", "testing")
STATES_SHAPES = [
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    for folder in (*FOLDERS, ".")
    for file in (PACKAGE / folder).glob("*.py")
    if file.name != "__init__.py" and "from jaxtyping import" in file.read_text(encoding="utf-8")
]

if find_spec("beartype"):
    from jaxtyping import install_import_hook

    install_import_hook([*STATES_SHAPES, "kvinv_plugins"], "shapes.check")


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which only configurations are there."""
    import checkpoints

    folder = checkpoints.make("tiny", tmp_path_factory.mktemp("bare"))
    for file in folder.rglob("*"):
        if file.is_file() and file.name not in ("model_index.json", "config.json"):
            file.unlink()
    return folder
