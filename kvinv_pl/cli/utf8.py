"""Files of options, which jsonargparse opens in the locale's encoding: on Windows that is not YAML's."""

import sys
from typing import Any


def open_files_as_utf8() -> None:
    """Have jsonargparse read and write its files in UTF-8, from here on and wherever it is."""
    for name, module in [*sys.modules.items()]:
        if name.startswith("jsonargparse."):
            vars(module)["open"] = _open_as_utf8  # which comes before the built-in one


def _open_as_utf8(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
    if "b" not in mode and len(args) < 2:  # buffering, encoding
        options.setdefault("encoding", "utf-8")
    return open(file, mode, *args, **options)
