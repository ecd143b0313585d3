"""`python -m kvinv_pl` is `kvinv`."""

from kvinv_pl.cli.entry import main

main()
