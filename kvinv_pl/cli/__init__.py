"""The command line; `kvinv` is its main."""

from kvinv_pl.cli.entry import main

__all__ = ["main"]
