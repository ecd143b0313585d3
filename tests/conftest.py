"""What holds for every test: no network, one thread, and shapes in signatures are checked."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

# before anything imports the libraries that read them; the processes that tests start inherit them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
# jsonargparse reads the signatures of these: they stay as they are written
UNHOOKED = {"data", "listing", "module", "strategies", "trainer", "verbs"}

if find_spec("beartype"):
    from jaxtyping import install_import_hook

    files = [*(ROOT / "kvinv_pl").glob("[!_]*.py"), *(ROOT / "kvinv_pl").glob("[!_]*/__init__.py")]
    ours = {path.relative_to(ROOT / "kvinv_pl").parts[0].removesuffix(".py") for path in files}
    names = [f"kvinv_pl.{name}" for name in sorted(ours - UNHOOKED)]
    install_import_hook([*names, "kvinv_plugins"], "shapes.check")
