"""What holds for every test: no network, one thread, and shapes in signatures are checked."""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# before anything imports the libraries that read them; the processes that tests start inherit them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)
gc.disable()  # until everything is imported

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
    import jaxtyping
    import shapes

    jaxtyping.jaxtyped = shapes.jaxtyped  # by which the hook decorates functions
    jaxtyping.install_import_hook([*STATES_SHAPES, "kvinv_plugins"], "shapes.check")

    def pytest_runtest_setup() -> None:
        shapes.new_test()


def pytest_collection_finish() -> None:
    """Leave out of every collection of garbage what stays: it is half a million objects, half a second.

    And collect less often: nearly all that a forward makes is gone by itself before.
    """
    gc.freeze()
    gc.set_threshold(50_000)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """Do not wait for the disk, which matters where the power fails; errors of it are put in by tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def sooner() -> Iterator[None]:
    """Not everything is done anew thousands of times; `savings` says what is not."""
    import savings

    with pytest.MonkeyPatch.context() as patch:
        savings.put_in_place(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def read_once() -> Iterator[None]:
    """Read a checkpoint that was read before, and is as it was, from memory: three times as fast.

    What a test makes or changes for itself is read from the disk, as it is for a user.
    """
    from kvinv_pl.models import checkpoint
    from kvinv_pl.models.checkpoints import folder

    read, before, kept = checkpoint.load_folder, set[Any](), dict[Any, bytes]()

    def load_folder(place: Path, name: str, dtype: torch.dtype, vae: Any, variant: str | None) -> Any:
        files = [(file, file.stat()) for file in sorted(place.rglob("*.*")) if vae is None and file.is_file()]
        state = ((str(file), stat.st_mtime_ns, stat.st_size) for file, stat in files)
        key = (name, dtype, variant, *state)
        if files and key in kept:
            parts = torch.load(io.BytesIO(kept[key]), weights_only=False)
            # a tokenizer does not survive it: its words would be decoded with the marks of their ends
            return replace(parts, tokenizer=folder._tokenizer(place / "tokenizer"))
        parts = read(place, name, dtype, vae, variant)
        if files and key in before:
            torch.save(parts, buffer := io.BytesIO())
            kept[key] = buffer.getvalue()
        before.add(key)
        return parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load_folder", load_folder)
        yield


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which only configurations are there."""
    import checkpoints

    folder = checkpoints.make("tiny", tmp_path_factory.mktemp("bare"))
    for file in folder.rglob("*"):
        if file.is_file() and file.name not in ("model_index.json", "config.json"):
            file.unlink()
    return folder


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The picture whose fit `fits.finished` copies; nobody may change it."""
    import fits

    return fits.picture(tmp_path_factory.mktemp("pictures") / "cat.png")
