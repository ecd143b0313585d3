"""`kvinv studio`: a page in the browser over the calls of `kvinv_pl.api`."""
