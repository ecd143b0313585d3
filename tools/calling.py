"""The command line of the programs in this folder."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from kvinv_pl.errors import UserError


def call(command: Callable[..., Any] | dict[str, Any], args: list[str] | None = None) -> None:
    """Call a function, or one of several, with the options of the command line.

    `--seed-base` is `--seed_base`; a user's mistake is one line and exit code 2.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as kvinv; of use where torch is loaded later
    typed = sys.argv[1:] if args is None else args
    normalized = [
        re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), arg) for arg in typed
    ]
    try:
        auto_cli(command, args=normalized, as_positional=False)
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
