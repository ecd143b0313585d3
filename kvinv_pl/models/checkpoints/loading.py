"""Loading a model's files: errors in one line, digests, and silenced libraries."""

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from kvinv_pl.errors import UserError

HUB_ID = r"\w[\w.-]*/[\w.-]+"
REDOWNLOAD = "download or copy it again"


def try_read(path: Path, read: Callable[[], Any]) -> Any:
    """Call `read`; any error becomes a UserError of one line."""
    try:
        return read()
    except Exception as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}; {REDOWNLOAD}") from error


def load_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file of a model."""
    return try_read(file, lambda: dict(json.loads(file.read_text(encoding="utf-8"))))


def require_type(folder: Path, expected: str, needed: str) -> None:
    """Refuse a folder whose config.json is not of this model_type; `needed` is what is accepted."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; {needed}")
    if (kind := load_json(folder / "config.json").get("model_type")) != expected:
        raise UserError(f"{folder} is of the kind {kind}; {needed}")


def load_pretrained(cls: Any, where: Path | str, **options: Any) -> Any:
    """A model as its library loads it from a folder or the hub, of whose weights none is missing."""
    read = partial(cls.from_pretrained, where, output_loading_info=True, **options)
    model, info = try_read(Path(where), read)
    if any(".base_layer." in key for key in info["unexpected_keys"]):
        raise UserError(
            f"{where} was saved with a LoRA that is not merged, whose scale no file says: "
            "save it again after fuse_lora() and unload_lora_weights() of its pipeline"
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{where} lacks {len(missing)} weights, such as {missing[0]}; {REDOWNLOAD}")
    return model


def find_checkpoint(
    checkpoint: str, embedded: Callable[[], Path], needed: str, files: bool = False
) -> Path | None:
    """The folder or file of a checkpoint; None: it is a hub id (owner/name).

    Args:
        checkpoint: "menagerie", a folder, a file, or a hub id.
        embedded: Returns the folder of "menagerie".
        needed: What is accepted, for the error message.
        files: Whether it may be a file other than a folder's model_index.json.
    """
    if checkpoint == "menagerie":
        return embedded()
    place = Path(checkpoint).expanduser()
    if place.is_file() and place.name == "model_index.json":
        return place.parent
    if place.is_dir() or (files and place.is_file()):
        return place
    if place.is_file():
        raise UserError(f"{checkpoint} is a file, expected a folder; {needed}")
    if not re.fullmatch(HUB_ID, checkpoint):
        raise UserError(f"there is no folder {checkpoint}; {needed}")
    return None


def first_line(error: Exception) -> str:
    """The first line of an error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def digest(path: Path) -> str:
    """The SHA-256 of a file, as model sites show it."""
    content = hashlib.sha256()

    def read() -> str:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                content.update(chunk)
        return content.hexdigest()

    return try_read(path, read)


def sha256(folder: Path, files: Iterable[Path]) -> str:
    """One digest of the names and contents of files; in threads, because hashing releases the GIL."""

    def line(path: Path) -> str:
        return f"{path.relative_to(folder).as_posix()} {digest(path)}\n"

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256("".join(pool.map(line, sorted(files))).encode()).hexdigest()


def combined(base: str, others: Mapping[str, str]) -> str:
    """The digest of a checkpoint with what is added to it; its own, where nothing is."""
    if not others:
        return base
    lines = [base, *(f"{name} {value}" for name, value in others.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Silence the logs and warnings of diffusers, transformers and huggingface_hub.

    Also their progress bars, unless `bars`.
    """
    drawing = (diffusers_logging, transformers_logging)
    before = [(library, library.get_verbosity()) for library in (*drawing, hub_logging)]
    with_bars = [library for library in drawing if library.is_progress_bar_enabled() and not bars]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for library, _ in before:
                library.set_verbosity(logging.CRITICAL)
            for library in with_bars:
                library.disable_progress_bar()
            yield
        finally:
            for library, verbosity in before:
                library.set_verbosity(verbosity)
            for library in with_bars:
                library.enable_progress_bar()
